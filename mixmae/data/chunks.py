"""Rows and chunks: a row is an image's index in storage order, a chunk is what storage reads at once.

Storage cuts the rows of a collection into consecutive chunks (a Parquet row group, 64 files of a folder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

CHUNK_ROWS = 64
"""Rows per chunk where the layout has no chunks of its own: files in folders, members of tars."""


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Finds rows in chunks."""

    sizes: Int64Array
    """(num_chunks,) rows per chunk, in storage order."""

    @cached_property
    def starts(self) -> Int64Array:
        """(num_chunks + 1,) first row of every chunk, and at the end the number of rows."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        """Rows in all chunks."""
        return int(self.starts[-1])

    def locate(self, rows: Sequence[int] | Int64Array) -> tuple[Int64Array, Int64Array]:
        """Find rows in their chunks.

        Args: rows: (n,) in [0, num_rows), in any order.
        Returns: chunks (n,) int64, the chunk of each row; within (n,) int64, its index inside the chunk.
        """
        rows = np.asarray(rows, dtype=np.int64)
        chunks = np.searchsorted(self.starts, rows, side="right") - 1
        return chunks, rows - self.starts[chunks]


def group_by_chunk(chunks: Int64Array) -> list[Int64Array]:
    """Group rows that lie in the same chunk, so that each chunk is read once.

    Args: chunks: (n,) the chunk of each row, as ChunkIndex.locate gives it.
    Returns: for each chunk that occurs, in storage order, the indices of its rows in `chunks`, in the order given.
    """
    if not len(chunks):
        return []
    order = np.argsort(chunks, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1)


def cut_chunks(num_rows: int) -> Int64Array:
    """Sizes of chunks of CHUNK_ROWS rows, the last one shorter: (num_chunks,) int64."""
    return np.diff(np.append(np.arange(0, num_rows, CHUNK_ROWS), num_rows)).astype(np.int64)
