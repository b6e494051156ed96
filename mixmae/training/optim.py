"""The optimiser of the paper and its parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as in the paper's table 11."""

    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256 images; the peak rate is base_lr x batch / 256."""
    weight_decay: float = 0.05
    """Decoupled weight decay of weights; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum of the gradient and of its square."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; None, as in the paper, clips nothing."""

    def __post_init__(self) -> None:
        if not self.base_lr > 0:
            raise ValueError(f"base_lr is {self.base_lr}: it must be above 0.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: it must be 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}: each must be in [0, 1).")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm is {self.clip_grad_norm}: it must be above 0, or None for no clipping.")

    def peak_lr(self, batch_size: int) -> float:
        """The linear scaling rule: base_lr x batch / 256 (paper, appendix A.1)."""
        return self.base_lr * batch_size / 256


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed and undecayed ones.

    Returns: two groups, {params, weight_decay, names}; vectors and scalars (biases, norms) are in the undecayed one.
    Source: the rule of the official code (through timm): one-dimensional parameters and biases are not decayed,
    relative position tables and the mask token are.
    """
    decayed: dict[str, nn.Parameter] = {}
    undecayed: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias")
            (undecayed if plain else decayed)[name] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay, "names": list(decayed)},
        {"params": list(undecayed.values()), "weight_decay": 0.0, "names": list(undecayed)},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the loop sets each group's lr at every step, times its `lr_scale` if any."""
    # The fused kernel is torch's fastest on CPU and GPU and gives the same bits from run to run.
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.base_lr, betas=config.betas, fused=True
    )
