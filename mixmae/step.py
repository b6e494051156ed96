"""What one training step of any task returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The result of a task's forward on one batch, which the training loop reads."""

    loss: Tensor
    """Scalar with a gradient: the mean over the given batch."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars, each a mean over the batch; the loop averages them over micro-batches and workers."""
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached tensors that a panel is drawn from; empty unless the task was asked for them."""
