"""Stochastic depth: drop the branch of a block for some samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the branch of a whole sample with probability `rate` while training, and scale the others up.

    It draws from torch's default generator of the device: a loop that resumes exactly seeds that generator every step.
    Source: Huang et al. 2016; used for finetuning only (paper Table 12).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Let the rate rise linearly from 0 at the first block to `last` at the last block, over all stages.

    Returns: one list of rates per stage.
    """
    num_blocks = sum(depths)
    rates = iter(last * i / max(1, num_blocks - 1) for i in range(num_blocks))
    return [[next(rates) for _ in range(depth)] for depth in depths]
