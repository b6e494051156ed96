"""LARS: SGD with momentum in which each weight matrix moves by a share of its own norm.

Source: You et al., "Large Batch Training of Convolutional Networks" (2017), in the form that MoCo v3 and MAE use for
linear probing: the trust ratio scales the gradient before it enters the momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    """For each parameter w with gradient g and velocity v, v starting at 0:

        u = g + weight_decay * w
        v = momentum * v + trust_coefficient * |w| / |u| * u
        w = w - lr * v

    The ratio is 1 where |w| or |u| is 0. One-dimensional parameters (biases, norms) have no decay and no ratio.

    Args: params: parameters or groups of them; a group may set any of the others for itself.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim > 1:
                    update = update + group["weight_decay"] * weight
                    ratio = group["trust_coefficient"] * weight.norm() / update.norm()
                    # 0, infinite or 0 / 0 where a norm is 0; `where` does not wait for a GPU as an `if` would
                    update = update * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
                state = self.state[weight]
                if not state:
                    state["velocity"] = torch.zeros_like(weight)
                velocity = state["velocity"].mul_(group["momentum"]).add_(update)
                weight.sub_(group["lr"] * velocity)
