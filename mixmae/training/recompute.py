"""Less memory for more time: blocks that keep only their input, and are computed again for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_stages(model: nn.Module, stages: Sequence[int]) -> None:
    """Let the blocks of some stages keep their input alone. Losses and gradients stay the same, bit for bit on a CPU.

    Args:
        model: with an `encoder`, whose stages have `blocks`, or that has blocks itself (a plain ViT: one stage).
        stages: numbers from 1.
    """
    if not stages:
        return
    encoder = model.get_submodule("encoder")
    parts = list(encoder.get_submodule("stages").children()) if hasattr(encoder, "stages") else [encoder]
    for number in stages:
        for block in parts[number - 1].get_submodule("blocks").children():
            # Drop path draws the same again: checkpoint puts torch's generators back.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
