"""Which images of a step belong to which worker: the one place that cuts a global batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """One worker's contiguous slice of every global batch, and the pieces in which it goes through the model.

    Raises: ValueError if the batch cannot be cut so.
    """

    batch_size: int
    """Global batch: images per optimiser step, over all workers and micro-batches."""
    micro_batch_size: int | None = None
    """Images that the worker puts through the model at once; None: its whole share (no accumulation)."""
    rank: int = 0
    """Which worker this is, in [0, num_workers)."""
    num_workers: int = 1
    """Workers that share each batch."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or not 0 <= self.rank < self.num_workers:
            raise ValueError(
                f"rank {self.rank} of {self.num_workers} workers does not exist: ranks go from 0 to num_workers - 1"
            )
        if self.batch_size < 1 or self.batch_size % self.num_workers:
            raise ValueError(
                f"A batch of {self.batch_size} images cannot be shared equally by {self.num_workers} workers: make "
                "--loop.batch-size a multiple of --workers."
            )
        if self.micro_batch < 1 or self.images % self.micro_batch:
            raise ValueError(
                f"A worker's share of the batch is {self.images} images ({self.batch_size} / {self.num_workers} "
                f"workers), not a multiple of the micro-batch of {self.micro_batch}: change --loop.micro-batch-size."
            )

    @property
    def images(self) -> int:
        """Images of each step that are this worker's."""
        return self.batch_size // self.num_workers

    @property
    def micro_batch(self) -> int:
        """Images that go through the model at once."""
        return self.images if self.micro_batch_size is None else self.micro_batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of each step."""
        return self.images // self.micro_batch

    def first_sample(self, index: int) -> int:
        """Place in the global batch of the first image of this worker's micro-batch number `index` of a step."""
        return self.rank * self.images + index * self.micro_batch
