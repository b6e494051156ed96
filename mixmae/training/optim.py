"""The optimisers and their parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mixmae.encoders.base import DepthRule, Encoder, head_depth
from mixmae.training.lars import Lars

TIMM_UNDECAYED = ("relative_position_bias_table", "pos_embed", "cls_token")
"""Ends of the names that timm's encoders list as not decayed, beside one-dimensional parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as in the paper's table 11, or LARS; finetuning adds layer decay (table 12)."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """lars is for linear probing; it takes its momentum from the first of `betas`."""
    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256 images; the peak rate is base_lr x batch / 256."""
    lr: float | None = None
    """The peak rate itself, whatever the batch; None: base_lr x batch / 256."""
    weight_decay: float = 0.05
    """Decoupled weight decay of weights; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum of the gradient and of its square."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; None, as in the paper, clips nothing."""
    layer_decay: float | None = None
    """Factor on the learning rate from each block to the one below it (finetuning: 0.7); None: one rate for all."""
    layer_decay_rule: DepthRule = "official"
    """official: the head's rate is scaled once too, and relative position tables are decayed. timm: neither."""

    def __post_init__(self) -> None:
        if not self.base_lr > 0:
            raise ValueError(f"base_lr is {self.base_lr}: it must be above 0.")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr is {self.lr}: it must be above 0, or None for base_lr x batch / 256.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: it must be 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}: each must be in [0, 1).")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm is {self.clip_grad_norm}: it must be above 0, or None for no clipping.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}: it must be in (0, 1], or None for one rate.")

    def peak_lr(self, batch_size: int) -> float:
        """The peak rate: lr, or by the linear scaling rule base_lr x batch / 256 (paper, appendix A.1)."""
        return self.base_lr * batch_size / 256 if self.lr is None else self.lr


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups of one learning rate and one weight decay.

    Args: model: bare; for layer decay it keeps its encoder as `encoder`, and everything else is its head.
    Returns: groups {params, weight_decay, names, lr_scale}, at most two for each depth, the stem first: decayed
        weights, then vectors and scalars (biases, norms). The loop multiplies each step's rate by lr_scale.
    Raises: ValueError for layer decay of a model without an encoder.
    Source: official: one-dimensional parameters and biases are not decayed, relative position tables and the mask token
        are; lr_scale = layer_decay ** (num_blocks + 1 - depth), depth as in encoders/base.py (every number checked
        against tests/golden). timm: as its param_groups_layer_decay.
    """
    depths, top = _depths(model, config)
    spared = TIMM_UNDECAYED if config.layer_decay is not None and config.layer_decay_rule == "timm" else ()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, plain = depths.get(name, 0), parameter.ndim <= 1 or name.endswith((".bias", *spared))
        group = groups.setdefault(
            (depth, plain),
            {
                "params": [],
                "weight_decay": 0.0 if plain else config.weight_decay,
                "names": [],
                "lr_scale": (config.layer_decay or 1.0) ** (top - depth),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _depths(model: nn.Module, config: OptimConfig) -> tuple[dict[str, int], int]:
    """The depth of each parameter by name, and the depth at which the rate is not scaled; one depth for no decay."""
    if config.layer_decay is None:
        return {}, 0
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ValueError("layer_decay needs a model on an encoder; set it to None for this one.")
    rule = config.layer_decay_rule
    depths = dict.fromkeys((name for name, _ in model.named_parameters()), head_depth(encoder, rule))
    depths |= {f"encoder.{name}": depth for name, depth in encoder.parameter_depths().items()}
    return depths, encoder.num_blocks + 1


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; the loop sets each group's lr at every step, times its `lr_scale`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "lars":
        return Lars(groups, lr=config.base_lr, momentum=config.betas[0])
    # The fused kernel is torch's fastest on CPU and GPU and gives the same bits from run to run.
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, fused=True)
