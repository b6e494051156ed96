"""How long a run is and which learning rate each step has: pure functions of the config and the data set's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The length of a run in optimiser steps, derived once from epochs, batch and number of images."""

    total_steps: int
    """Optimiser steps of the whole run."""
    warmup_steps: float
    """Steps of linear warmup; a fraction is fine, as in the official per-iteration schedule."""
    steps_per_epoch: float
    """Images divided by the global batch, not rounded: a batch may straddle two epochs, so no image is dropped."""

    def every(self, epochs: float) -> int:
        """Steps between two events that should happen each `epochs` epochs; at least four such events in a run."""
        return max(1, min(round(epochs * self.steps_per_epoch), math.ceil(self.total_steps / 4)))


def run_length(
    *, num_images: int, batch_size: int, epochs: float, warmup_epochs: float, steps: int | None = None
) -> RunLength:
    """Turn epochs into steps.

    Args:
        num_images: images of the training set.
        batch_size: global batch, images an optimiser step.
        epochs: passes over the set. warmup_epochs: of these, the linear warmup.
        steps: when given, the run has this many steps whatever the set's size; the warmup keeps its share.
    Raises: ValueError if the set is smaller than a batch or the run has no step.
    """
    if num_images < batch_size:
        raise ValueError(
            f"The training set has {num_images} images but a batch needs {batch_size}: lower --loop.batch-size "
            "or add images."
        )
    steps_per_epoch = num_images / batch_size
    # The last incomplete batch of the whole run is the only one that is not trained on.
    total_steps = math.floor(epochs * num_images / batch_size) if steps is None else steps
    if total_steps < 1:
        raise ValueError(f"The run has no step: raise --loop.epochs (now {epochs}) or --loop.steps (now {steps}).")
    return RunLength(
        total_steps=total_steps,
        warmup_steps=total_steps * warmup_epochs / epochs,
        steps_per_epoch=steps_per_epoch,
    )


Schedule = Literal["cosine", "poly", "step"]
"""How the learning rate falls after the warmup. cosine: a half cosine to 0. poly: on a straight line that begins at the
first step, warmup included, and ends at 0, as segmentation does it. step: by STEP_FACTOR at each of STEP_AT, as
detection does it."""
STEP_AT, STEP_FACTOR = (8 / 9, 0.963), 0.1
"""Shares of the run's steps, and what the rate is multiplied by there. Source: ViTDet's configs."""


def learning_rate(
    step: int, *, peak: float, length: RunLength, final: float = 0.0, schedule: Schedule = "cosine"
) -> float:
    """Linear warmup from 0, then as the schedule says, evaluated at the start of each step.

    Args:   step: 0 is the first step.  peak, final: learning rates; `final` is the cosine's.
    Returns: the learning rate of that step; step 0 has rate 0 when there is a warmup.
    Source: paper table 11; the cosine equals the official per-iteration schedule with epoch = step / steps_per_epoch.
        poly: of power 1, from BEiT's and Swin's segmentation configs.
    """
    warmup = min(1.0, step / length.warmup_steps) if length.warmup_steps else 1.0
    if schedule == "poly":
        return peak * warmup * max(0.0, 1 - step / length.total_steps)
    if schedule == "step":
        return peak * warmup * STEP_FACTOR ** sum(step >= share * length.total_steps for share in STEP_AT)
    if step < length.warmup_steps:
        return peak * step / length.warmup_steps
    progress = (step - length.warmup_steps) / max(length.total_steps - length.warmup_steps, 1e-12)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
