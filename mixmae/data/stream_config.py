"""The config of mixmae.data.streams, apart from it so that a command line is read without Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How the stream is executed. Nothing here changes which images come or in which order."""

    target_block_images: int = 512
    """Images that one task decodes, at most; a block has as many whole micro-batches as fit."""
    target_block_mb: float = 80.0
    """Size of a finished block, at most; the smaller of the two limits holds."""
    decode_concurrency: int | None = None
    """Decode tasks at once, per worker. None: the cluster's CPUs beyond one per worker, shared by the workers."""
    decode_threads: int | None = None
    """Threads in a decode task. None: 1, or more if there are fewer tasks at once than cores."""
    decode_cpus: float | None = None
    """CPUs that Ray books for a decode task. None: 1, or a fraction if fewer CPUs than tasks are left after the
    workers'."""
    prefetch_blocks: int = 2
    """Finished blocks that wait in a worker for the loop."""
    object_store_mb: float | None = None
    """Budget in the object store for one worker's blocks under way. None: enough to keep every task busy."""
    segment_blocks: int = 1000
    """Blocks in one Ray Data execution; the next starts while the current one ends."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
