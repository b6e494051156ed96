"""The initial weights of the paper."""

from __future__ import annotations

from torch import nn

TABLE_STD = 0.02
"""Std of the initial mask tokens, learned positions and relative position tables."""


def init_projections(module: nn.Module) -> None:
    """Fill all linear layers below `module` with xavier-uniform weights and zero biases; norms keep ones and zeros.

    The patch projection is a linear layer written as a convolution, and is filled as one. A depthwise convolution
    counts as n inputs and n outputs per channel, n = rows * columns of its kernel.
    Source: paper A.1 ("xavier_uniform to initialize all Transformer blocks").
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            weight = part.weight.flatten(1)
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                limit = (6 / (2 * weight.shape[1])) ** 0.5
                nn.init.uniform_(weight, -limit, limit)
            else:
                nn.init.xavier_uniform_(weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
