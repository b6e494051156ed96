"""The Source protocol: chunks of rows; each row has an image file's bytes and a label.

A source knows how many rows each of its chunks has and reads any rows of one chunk. Who reads which rows, and when, is
decided by order.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmae.data.account import Met
from mixmae.data.chunks import ChunkIndex, Int64Array, group_by_chunk


class DataError(ValueError):
    """The data that a user named cannot be used as it is; the message has the remedy."""


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
    """(num_intervals + 1,) uint32: where the intervals of a restart-tile JPEG begin in `data` (tiles.py); None: a plain
    file."""
    path: str = ""
    """The image file's path below the root of its collection, or its name in the shard; empty if it was not kept. Bytes
    that are not UTF-8 are escaped, as in `where`."""
    problem: str = ""
    """Why there is no data, if that is known: the file is gone, or is another one than when the source was opened."""


class Source(Protocol):
    """A collection of images in a fixed storage order. Every source can be pickled; connections are per process."""

    @property
    def name(self) -> str:
        """A short name for logs and for the tracker."""

    @property
    def digest(self) -> str:
        """32 hex digits over names, contents and classes: another digest means other data. Computed when first asked
        for, which reads all local files once; contents.py keeps what it found."""

    @property
    def met(self) -> tuple[Met, ...]:
        """What was met when the source was opened, place by place."""

    @property
    def chunk_sizes(self) -> Int64Array:
        """(num_chunks,) int64, rows per chunk in storage order."""

    @property
    def chunks(self) -> ChunkIndex:
        """Finds rows in chunks."""

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
        """Read rows of one chunk.

        Args: chunk: in [0, num_chunks).  rows_in_chunk: (n,) indices inside the chunk, in any order.
        Returns: n samples in the order asked for. What cannot be read, or has changed since the source was opened, has
            empty data and its `problem`.
        Raises: DataError if a shard or tar is gone.
        """

    def read_labels(self) -> Int64Array:
        """The class index of every row: (num_rows,) int64, below 0 where there is none. No image is read.

        Raises: DataError if a shard is gone.
        """

    def where(self, row: int) -> str:
        """Where a row of the source is stored, for people: as in its Sample."""


class Chunked:
    """What a source derives from its chunk_sizes."""

    chunk_sizes: Int64Array

    @cached_property
    def chunks(self) -> ChunkIndex:
        return ChunkIndex(self.chunk_sizes)

    @property
    def num_rows(self) -> int:
        return self.chunks.num_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRange(Chunked):
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
    def met(self) -> tuple[Met, ...]:
        return self.base.met

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.base.class_names

    @property
    def has_labels(self) -> bool:
        return self.base.has_labels

    @property
    def dense(self) -> Any:
        """What is known about pixels: mixmae.data.truth.DenseClasses, or None."""
        return getattr(self.base, "dense", None)

    @property
    def num_bytes(self) -> int:
        return self.base.num_bytes * self.num_rows // self.base.num_rows

    @property
    def exact_reads(self) -> bool:
        return self.base.exact_reads

    @cached_property
    def _ends(self) -> tuple[Int64Array, Int64Array]:
        """Chunk and index inside it of the first row and of the last."""
        return self.base.chunks.locate([self.start, self.stop - 1])

    @cached_property
    def chunk_sizes(self) -> Int64Array:  # type: ignore[override]
        (first, last), _ = self._ends
        edges = np.clip(self.base.chunks.starts[first : last + 2], self.start, self.stop)
        return np.diff(edges)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        return self.base.read(*self._in_base(chunk, rows_in_chunk))

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Any]:
        """What is known about pixels of rows of one chunk (mixmae.data.truth), where the base knows it."""
        return self.base.read_truth(*self._in_base(chunk, rows_in_chunk))  # type: ignore[attr-defined]

    def _in_base(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> tuple[int, Int64Array]:
        """The chunk of the base, and the rows inside it."""
        rows = np.asarray(rows_in_chunk, dtype=np.int64)
        (first, _), (skipped, _) = self._ends
        return int(first) + chunk, rows + skipped if chunk == 0 else rows

    def read_labels(self) -> Int64Array:
        return self.base.read_labels()[self.start : self.stop]

    def where(self, row: int) -> str:
        return self.base.where(self.start + row)


def read_rows(source: Source, rows: Sequence[int] | Int64Array) -> list[Sample]:
    """Any rows of a source in the order asked for, each chunk read once.   Raises: DataError as Source.read does."""
    chunks, within = source.chunks.locate(rows)
    samples: dict[int, Sample] = {}
    for group in group_by_chunk(chunks):
        samples |= zip(group.tolist(), source.read(int(chunks[group[0]]), within[group]), strict=True)
    return [samples[index] for index in range(len(chunks))]


def short_digest(text: str) -> str:
    """32 hex digits of SHA-256."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]
