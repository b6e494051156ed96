"""Several sources as one, each counted with a weight.

A row of a source of weight w comes floor(w) times per epoch, or once more: round((w - floor(w)) * rows) of its rows are
chosen by a hash of the row to come once more. So each row comes exactly floor(w) or ceil(w) times; weight 1 is exactly
once, weight 3 exactly three times, and weight 0.25 a fixed quarter of the rows. The choice is the same in every epoch:
an epoch stays a fixed set of rows, which is what makes it countable and resumable. Copies of a row are rows of their
own with crops of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mixmae.data.account import Met
from mixmae.data.chunks import CHUNK_ROWS, ChunkIndex, Int64Array
from mixmae.data.order import Draw, hash64
from mixmae.data.source import Chunked, DataError, Sample, Source, read_rows, short_digest
from mixmae.data.truth import DenseClasses, DenseSource, Truth, dense_classes, read_truths


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedSource(Chunked):
    """Each part's chunks, floor(weight) times, then its rows that come once more."""

    parts: tuple[Source, ...]
    weights: tuple[float, ...]
    class_names: tuple[str, ...] | None
    label_maps: tuple[Int64Array | None, ...]
    """(num_parts,) of each part, new label by old label; None keeps labels as they are."""
    has_labels: bool

    @property
    def name(self) -> str:
        terms = [
            part.name if weight == 1 else f"{weight:g} x {part.name}"
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return " + ".join(terms)

    @property
    def digest(self) -> str:
        facts = [f"{part.digest} {weight!r}" for part, weight in zip(self.parts, self.weights, strict=True)]
        return short_digest("\n".join(facts))

    @property
    def met(self) -> tuple[Met, ...]:
        return tuple(met for part in self.parts for met in part.met)

    @property
    def num_bytes(self) -> int:
        return int(sum(part.num_bytes * weight for part, weight in zip(self.parts, self.weights, strict=True)))

    @property
    def dense(self) -> DenseClasses | None:
        """What is known about pixels, if all parts know the same."""
        known = [dense_classes(part) for part in self.parts]
        return known[0] if all(classes == known[0] for classes in known) else None

    @property
    def exact_reads(self) -> bool:
        return all(part.exact_reads for part in self.parts)

    @cached_property
    def _extra_rows(self) -> list[Int64Array]:
        """Of each part, the rows that come once more, in storage order."""
        chosen = []
        for number, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            count = math.floor((weight - math.floor(weight)) * part.num_rows + 0.5)
            order = np.argsort(hash64(Draw.SOURCES, number, np.arange(part.num_rows)), kind="stable")
            chosen.append(np.sort(order[:count]).astype(np.int64))
        return chosen

    @cached_property
    def _chunks(self) -> list[tuple[int, int]]:
        """(part, chunk of it) of the whole chunks, then (part, -1 - first index among its extra rows)."""
        chunks = []
        for number, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            chunks += [(number, chunk) for _ in range(math.floor(weight)) for chunk in range(len(part.chunk_sizes))]
            chunks += [(number, -1 - first) for first in range(0, len(self._extra_rows[number]), CHUNK_ROWS)]
        return chunks

    @cached_property
    def chunk_sizes(self) -> Int64Array:  # type: ignore[override]
        sizes = [
            self.parts[part].chunk_sizes[chunk]
            if chunk >= 0
            else min(CHUNK_ROWS, len(self._extra_rows[part]) - (-1 - chunk))
            for part, chunk in self._chunks
        ]
        return np.array(sizes, dtype=np.int64)

    @cached_property
    def part_index(self) -> ChunkIndex:
        """The stored images of all parts one after the other, each counted once: a part is a chunk."""
        return ChunkIndex(np.array([part.num_rows for part in self.parts], dtype=np.int64))

    @cached_property
    def stored_rows(self) -> Int64Array:
        """(num_rows,) int64, a number for every stored image: the same for all copies of one."""
        numbers = [
            np.concatenate([np.tile(np.arange(part.num_rows), math.floor(weight)), extra]) + first
            for part, weight, extra, first in zip(
                self.parts, self.weights, self._extra_rows, self.part_index.starts, strict=False
            )
        ]
        return np.concatenate(numbers).astype(np.int64)

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        """What is known about pixels, where `dense` says that it is."""
        part, base = self._chunks[chunk]
        source = self.parts[part]
        assert isinstance(source, DenseSource)
        if base >= 0:
            return source.read_truth(base, rows_in_chunk)
        return read_truths(source, self._extra_rows[part][np.asarray(rows_in_chunk, dtype=np.int64) + (-1 - base)])

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        part, base = self._chunks[chunk]
        if base >= 0:
            samples = self.parts[part].read(base, rows_in_chunk)
        else:
            indices = np.asarray(rows_in_chunk, dtype=np.int64) + (-1 - base)
            samples = read_rows(self.parts[part], self._extra_rows[part][indices])
        return [self._relabel(part, sample) for sample in samples]

    def read_labels(self) -> Int64Array:
        labels = [part.read_labels() for part in self.parts]
        joined = []
        for (part, base), size in zip(self._chunks, self.chunk_sizes.tolist(), strict=True):
            if base >= 0:
                start = self.parts[part].chunks.starts[base]
                own = labels[part][start : start + size]
            else:
                own = labels[part][self._extra_rows[part][-1 - base : -1 - base + size]]
            mapping = self.label_maps[part]
            if mapping is not None:
                known = (own >= 0) & (own < len(mapping))
                own = np.where(known, np.append(mapping, -1)[np.where(known, own, -1)], -1)
            joined.append(own)
        return np.concatenate(joined)

    def _relabel(self, part: int, sample: Sample) -> Sample:
        mapping = self.label_maps[part]
        if mapping is None:
            return sample
        label = int(mapping[sample.label]) if 0 <= sample.label < len(mapping) else -1
        return replace(sample, label=label)

    def where(self, row: int) -> str:
        (chunk,), (within,) = self.chunks.locate([row])
        part, base = self._chunks[chunk]
        if base >= 0:
            return self.parts[part].where(int(self.parts[part].chunks.starts[base] + within))
        return self.parts[part].where(int(self._extra_rows[part][-1 - base + within]))


def join(parts: Sequence[Source], weights: Sequence[float], like: Source | None = None) -> Source:
    """Several sources as one; a single one of weight 1 stays itself.

    Classes: parts that know the names of their classes are joined by name, in the order in which names first appear;
    if no part has class names, labels are used as they are. If only some parts do, numbers would mean different things,
    and all images count as unlabelled. A part without labels changes nothing.

    Args:   like: the training split of the same sources, whose numbers of the classes count here too.
    Raises: DataError if a weight is not above 0 or nothing remains.
    """
    for part, weight in zip(parts, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of {part.name} is {weight}: give a number above 0, or leave the source out")
    if len(parts) == 1 and weights[0] == 1 and (like is None or like.class_names == parts[0].class_names):
        return parts[0]
    labelled = [part for part in parts if part.has_labels]
    numbering = labelled if like is None else [like, *labelled]
    known = [source.class_names for source in numbering if source.class_names is not None]
    class_names: tuple[str, ...] | None = None
    maps: list[Int64Array | None] = [None] * len(parts)
    mixed = len({source.class_names is None for source in numbering}) > 1 or (like is not None and not like.has_labels)
    if mixed:
        maps = [np.empty(0, dtype=np.int64) for _ in parts]
    elif known:
        class_names = tuple(dict.fromkeys(name for names in known for name in names))
        index = {name: number for number, name in enumerate(class_names)}
        maps = [
            np.array([index[name] for name in part.class_names or ()], dtype=np.int64)
            if part.has_labels and part.class_names != class_names
            else None
            for part in parts
        ]
    joined = JoinedSource(
        parts=tuple(parts),
        weights=tuple(float(weight) for weight in weights),
        class_names=class_names,
        label_maps=tuple(maps),
        has_labels=bool(labelled) and not mixed,
    )
    if joined.num_rows == 0:
        raise DataError(f"{joined.name} has no rows: the weights are too small for sources of this size")
    return joined
