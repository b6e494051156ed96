"""Which images of a step belong to which worker: the one place that cuts a global batch.

A batch is dealt in blocks, which are never cut, and each worker gets as many of them as the others or one more. So the
batch stays the same for any number of workers, and so does all that is drawn for an image or for a block.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class WorkerRange:
    """How many workers a run takes: one number, or as many as there is room for between two."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str | int) -> WorkerRange:
        """Read N or MIN:MAX.   Raises: ValueError."""
        found = re.fullmatch(r"(-?\d+)(?::(-?\d+))?", str(text).strip())
        if found is None:
            raise ValueError(f"--workers is {text}: give a number, or the least and the most of them, such as 2:8.")
        least, most = int(found[1]), int(found[2] or found[1])
        if least < 1:
            raise ValueError(f"--workers is {text}: it must be at least 1.")
        if most < least:
            raise ValueError(f"--workers is {text}: the least number comes first, {most}:{least}.")
        return cls(least, most)

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change while a run goes on."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """One worker's contiguous slice of every global batch, and the pieces in which it goes through the model.

    Raises: ValueError if the batch cannot be cut so.
    """

    batch_size: int
    """Global batch: images per optimiser step, over all workers and micro-batches."""
    block: int = 1
    """Consecutive images that stay together in one micro-batch, such as those that mix with each other."""
    micro_batch_size: int | None = None
    """Images that the worker puts through the model at once, at most; None: its whole share (no accumulation)."""
    rank: int = 0
    """Which worker this is, in [0, num_workers)."""
    num_workers: int = 1
    """Workers that share each batch."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or not 0 <= self.rank < self.num_workers:
            raise ValueError(
                f"rank {self.rank} of {self.num_workers} workers does not exist: ranks go from 0 to num_workers - 1"
            )
        micro = self.micro_batch_size
        if self.batch_size < 1 or self.block < 1 or self.batch_size % self.block:
            raise ValueError(
                f"A batch of {self.batch_size} images cannot be cut into parts of {self.block}, which stay together: "
                f"make --loop.batch-size a multiple of {self.block}"
                f"{', or change --loop.micro-batch-size' if micro == self.block else ''}."
            )
        if micro is not None and (micro < 1 or micro % self.block):
            raise ValueError(
                f"A micro-batch of {micro} images cannot be cut into parts of {self.block}, which stay together: make "
                f"--loop.micro-batch-size a multiple of {self.block}."
            )
        if self.num_blocks < self.num_workers:
            parts = f", {self.num_blocks} times {self.block} that stay together," if self.block > 1 else ""
            raise ValueError(
                f"A batch of {self.batch_size} images{parts} cannot be shared by {self.num_workers} workers: lower "
                f"--workers to {self.num_blocks} or less, or raise --loop.batch-size."
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole batch: the most workers that can share it."""
        return self.batch_size // self.block

    @property
    def first(self) -> int:
        """Index in the global batch of the worker's first image."""
        return self.rank * self.num_blocks // self.num_workers * self.block

    @property
    def images(self) -> int:
        """Images of each step that are this worker's."""
        return (self.rank + 1) * self.num_blocks // self.num_workers * self.block - self.first

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Where the micro-batches of a step begin among the worker's images, and where the last one ends."""
        blocks = self.images // self.block
        parts = -(-self.images // self.micro_batch_size) if self.micro_batch_size else 1
        return tuple(part * blocks // parts * self.block for part in range(parts + 1))

    @cached_property
    def micro_batches(self) -> tuple[int, ...]:
        """Images of each micro-batch of a step."""
        return tuple(stop - start for start, stop in itertools.pairwise(self.edges))

    @property
    def accumulation(self) -> int:
        """Micro-batches of each step. Workers whose shares differ may have one more or less than others."""
        return len(self.micro_batches)

    @cached_property
    def most_micro_batches(self) -> int:
        """Micro-batches of each step of the worker that has the most of them."""
        return replace(self, rank=self.num_workers - 1).accumulation

    def first_sample(self, index: int) -> int:
        """Index in the global batch of the first image of this worker's micro-batch number `index` of a step."""
        return self.first + self.edges[index]

    def divisor(self, index: int) -> float:
        """What the mean loss of a micro-batch is divided by, so that the sum over the worker's micro-batches, averaged
        over the workers as DistributedDataParallel does, is the mean over the global batch."""
        return self.batch_size / (self.num_workers * self.micro_batches[index])
