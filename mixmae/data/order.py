"""Which image is seen when: the order of a whole run as a pure function of (seed, epoch, row). No Ray, no torch.

Words: a *row* is an image's index in storage order; a *chunk* is what storage reads at once (a Parquet row group);
a *window* is a run of permuted chunks whose rows are shuffled together; a *position* counts images over the whole run.

Epoch e permutes the chunks, cuts them into windows of at least `window_rows` rows and permutes the rows inside each
window. The run is the concatenation of its epochs: position q belongs to epoch q // num_rows. Every row comes exactly
once per epoch and none is dropped between epochs, because a global batch may contain images of two epochs.
Tail rule: only the last incomplete global batch of the whole run is not trained on.

Randomness is a stateless hash, not a generator: an order or a crop depends on its keys alone, so it is the same on
every worker, after every restart and in every numpy version.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from mixmae.data.chunks import ChunkIndex, Int64Array
from mixmae.share import WorkerShare

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draw(IntEnum):
    """What a random number is for; the first key of every hash, so that no two uses share numbers. Never renumber."""

    CHUNKS = 1
    ROWS = 2
    CROP = 3
    FLIP = 4
    HOLDOUT = 5
    SHAPES = 6
    SOURCES = 7
    RAND_AUGMENT = 8
    RANDOM_ERASING = 9
    MOTHS = 10
    SCENES = 11
    RESIZED_CROP = 12
    PHOTOMETRIC = 13
    LARGE_SCALE_JITTER = 14


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64: a bijection of 64-bit words in which every input bit moves every output bit.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), constants of Stafford's Mix13.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*keys: int | Int64Array) -> NDArray[np.uint64]:
    """Hash integer keys, broadcast against each other, to uint64.

    Args: keys: integers or int64 arrays; negative values count modulo 2**64.
    Returns: uint64 array of the broadcast shape (0-d keys give a 1-element array).
    """
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        word = np.atleast_1d(np.asarray(key, dtype=np.int64)).view(np.uint64)
        state = _finalise((state ^ _finalise(word + _GOLDEN)) + _GOLDEN)
    return state


def uniforms(count: int, *keys: int | Int64Array) -> NDArray[np.float64]:
    """Independent uniform numbers for each key.

    Args: count: numbers per key.  keys: as for hash64, broadcast to n.
    Returns: (n, count) float64 in [0, 1).
    """
    columns = [np.atleast_1d(np.asarray(key, dtype=np.int64))[:, None] for key in keys]
    words = hash64(*columns, np.arange(count, dtype=np.int64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *keys: int) -> Int64Array:
    """A permutation of range(n) that depends on the keys alone: (n,) int64."""
    return np.argsort(hash64(*keys, np.arange(n, dtype=np.int64)), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's chunks in order and where its windows begin."""

    chunks: Int64Array  # (num_chunks,) permuted
    window_chunk: Int64Array  # (num_windows + 1,) index into `chunks` where each window begins
    window_position: Int64Array  # (num_windows + 1,) position inside the epoch where each window begins


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The order of a run over one source. Cheap to build; looks only at the windows that are asked for."""

    chunk_sizes: Int64Array
    """Rows of every chunk in storage order."""
    seed: int = 0
    """Any integer. Another seed is another order and other crops."""
    window_rows: int = 1024
    """Rows shuffled together, at least. More mixes better and reads a chunk more often."""

    def __post_init__(self) -> None:
        sizes = np.asarray(self.chunk_sizes, dtype=np.int64)
        if sizes.ndim != 1 or sizes.size == 0 or (sizes < 0).any() or sizes.sum() == 0:
            raise ValueError("the plan of an order needs at least one chunk with rows in it; the source is empty")
        if self.window_rows < 1:
            raise ValueError(f"window_rows is {self.window_rows}: give 1 or more (1024 is the default)")
        object.__setattr__(self, "chunk_sizes", sizes)

    @cached_property
    def chunks(self) -> ChunkIndex:
        """Where the rows of every chunk begin."""
        return ChunkIndex(self.chunk_sizes)

    @property
    def num_rows(self) -> int:
        """Rows in the source, which is the length of an epoch."""
        return self.chunks.num_rows

    def rows_at(self, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """The images at positions [start, stop) of the run: (rows, epochs), each (stop - start,) int64."""
        return self.rows_of(np.arange(start, stop, dtype=np.int64))

    def rows_of(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The images at any positions of the run.

        Args: positions: (n,) int64 >= 0, in any order.
        Returns: rows (n,) int64 in [0, num_rows), epochs (n,) int64.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("a position of the run is negative")
        epochs, inside = np.divmod(positions, self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            layout = _lay_out(self, int(epoch))
            windows = np.searchsorted(layout.window_position, inside[here], side="right") - 1
            for window in np.unique(windows):
                at = here[windows == window]
                rows[at] = _shuffle_window(self, int(epoch), int(window))[inside[at] - layout.window_position[window]]
        return rows, epochs


# A plan hashes by identity (eq=False), so these caches belong to one plan; lru_cache is safe among threads.
@lru_cache(maxsize=8)
def _lay_out(plan: Plan, epoch: int) -> _Epoch:
    chunks = permutation(len(plan.chunk_sizes), Draw.CHUNKS, plan.seed, epoch)
    ends = np.cumsum(plan.chunk_sizes[chunks])
    total = int(ends[-1])
    cuts, positions = [0], [0]
    # The last window takes what would not fill one more, so that no window is short.
    while total - positions[-1] >= 2 * plan.window_rows:
        cut = int(np.searchsorted(ends, positions[-1] + plan.window_rows)) + 1
        if total - int(ends[cut - 1]) < plan.window_rows:
            break
        cuts.append(cut)
        positions.append(int(ends[cut - 1]))
    cuts.append(len(chunks))
    positions.append(total)
    return _Epoch(chunks, np.array(cuts, dtype=np.int64), np.array(positions, dtype=np.int64))


@lru_cache(maxsize=64)
def _shuffle_window(plan: Plan, epoch: int, window: int) -> Int64Array:
    """Rows of one window in the order in which they are seen: (rows of the window,) int64."""
    layout = _lay_out(plan, epoch)
    chunks = layout.chunks[layout.window_chunk[window] : layout.window_chunk[window + 1]]
    starts, sizes = plan.chunks.starts[chunks], plan.chunk_sizes[chunks]
    within = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.repeat(starts, sizes) + within
    return rows[np.argsort(hash64(Draw.ROWS, plan.seed, epoch, rows), kind="stable")]


def worker_positions(start: int, stop: int, share: WorkerShare) -> Int64Array:
    """Positions of the images [start, stop) of one worker's own stream, counted from step 0: (stop - start,) int64.

    The global batch of a step is the same for any number of workers; each takes a contiguous slice of it.
    """
    step, inside = np.divmod(np.arange(start, stop, dtype=np.int64), share.images)
    return step * share.batch_size + share.first + inside
