"""What a collection of images is to everything else: chunks of rows, and bytes with a label for every row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mixmae.data.order import Int64Array

CHUNK_ROWS = 64
"""Rows of a chunk where the layout has none of its own: files in folders, members of tars."""


class DataError(ValueError):
    """The data that a user handed over cannot be used as it is; the message says what to do."""


@dataclass(frozen=True)
class Sample:
    """One stored image."""

    data: bytes
    """The image file's bytes, not decoded; empty if the file is empty or could not be read."""
    label: int
    """Class index, -1 where there is none."""
    where: str
    """Where it is stored, for people: the file, or the shard with the row inside it and the file's original path."""
    restart_offsets: NDArray[np.uint32] | None = field(default=None, compare=False)
    """(num_intervals,) uint32: where the intervals of a restart-tile JPEG begin in `data`; None: a plain file."""
    path: str = ""
    """The image file's path below the root of its collection, or its name in the shard; empty if it was not kept."""


class Source(Protocol):
    """A collection of images in a fixed storage order."""

    @property
    def name(self) -> str:
        """A short name for logs and for the tracker."""

    @property
    def digest(self) -> str:
        """16 hex digits over names, sizes and row counts: another digest is other data."""

    @property
    def chunk_sizes(self) -> Int64Array:
        """Rows of every chunk in storage order: (num_chunks,) int64."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, or None if they are not known."""

    @property
    def has_labels(self) -> bool:
        """Whether any row has a class."""

    @property
    def num_rows(self) -> int:
        """Rows in all chunks."""

    @property
    def num_bytes(self) -> int:
        """About how many bytes the images take."""

    @property
    def exact_reads(self) -> bool:
        """Whether `read` fetches only the rows asked for, and not the whole chunk."""

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        """The samples at these places of one chunk, in the order asked for."""

    def where(self, row: int) -> str:
        """Where a row, counted over the whole source, is stored; for people."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRange:
    """The rows [start, stop) of another source, as a source."""

    base: Source
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.base.num_rows:
            raise DataError(
                f"rows {self.start} to {self.stop} are not inside the {self.base.num_rows} rows of a source"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name}[{self.start}:{self.stop}]"

    @property
    def digest(self) -> str:
        return short_digest(f"{self.base.digest} {self.start} {self.stop}")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.base.class_names

    @property
    def has_labels(self) -> bool:
        return self.base.has_labels

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def num_bytes(self) -> int:
        return self.base.num_bytes * self.num_rows // self.base.num_rows

    @property
    def exact_reads(self) -> bool:
        return self.base.exact_reads

    @cached_property
    def _first_chunk(self) -> int:
        return chunk_of(self.base, self.start)[0]

    @cached_property
    def _skipped(self) -> int:
        """Rows of the first chunk that come before the range."""
        return chunk_of(self.base, self.start)[1]

    @cached_property
    def chunk_sizes(self) -> Int64Array:
        last = chunk_of(self.base, self.stop - 1)[0]
        ends = np.cumsum(self.base.chunk_sizes[: last + 1])[self._first_chunk :]
        edges = np.concatenate([[self.start], np.minimum(ends, self.stop)])
        return np.diff(edges).astype(np.int64)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        rows = np.asarray(rows_in_chunk, dtype=np.int64)
        return self.base.read(self._first_chunk + chunk, rows + self._skipped if chunk == 0 else rows)

    def where(self, row: int) -> str:
        return self.base.where(self.start + row)


def chunk_of(source: Source, row: int) -> tuple[int, int]:
    """The chunk that holds a row of the source, and the row's place in it."""
    ends = np.cumsum(source.chunk_sizes)
    chunk = int(np.searchsorted(ends, row, side="right"))
    return chunk, int(row - (ends[chunk] - source.chunk_sizes[chunk]))


def read_rows(source: Source, rows: Sequence[int] | Int64Array) -> list[Sample]:
    """Any rows of a source in the order asked for, each chunk read once."""
    wanted = np.asarray(rows, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(source.chunk_sizes)])
    chunks = np.searchsorted(starts, wanted, side="right") - 1
    samples: list[Sample | None] = [None] * len(wanted)
    for chunk in np.unique(chunks):
        places = np.flatnonzero(chunks == chunk)
        for place, sample in zip(places, source.read(int(chunk), wanted[places] - starts[chunk]), strict=True):
            samples[place] = sample
    return [sample for sample in samples if sample is not None]


def cut_chunks(num_rows: int) -> Int64Array:
    """Sizes of chunks of CHUNK_ROWS rows, the last one shorter."""
    return np.diff(np.append(np.arange(0, num_rows, CHUNK_ROWS), num_rows)).astype(np.int64)


def short_digest(text: str) -> str:
    """16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
