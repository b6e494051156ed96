"""Mixup and CutMix of a batch, with a passed generator; the labels come out as distributions.

Legend: B images of a batch, H W their size, N classes. Image b is mixed with image B - 1 - b.
Source: Zhang et al., "mixup" (2018); Yun et al., "CutMix" (2019); one of the two for a whole batch, as timm does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mixmae.machine import to_device


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """How a batch of finetuning is mixed; the default is the paper's."""

    mixup: float = 0.8
    """Parameter of Mixup's beta distribution; 0 for none."""
    cutmix: float = 1.0
    """Parameter of CutMix's beta distribution; 0 for none."""
    probability: float = 1.0
    """Probability that a batch is mixed at all."""
    switch: float = 0.5
    """Probability of CutMix where both are on."""
    label_smoothing: float = 0.1
    """Share of the label that is distributed over all classes."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 for none, or more")
        for name in ("probability", "switch", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share in [0, 1]")


def mix_batch(
    config: MixupConfig, images: torch.Tensor, labels: torch.Tensor, num_classes: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image of a batch, and its label, with another.

    Args:   images: (B, C, H, W) float.  labels: (B,) int64 in [0, N).  generator: on the CPU.
    Returns: images (B, C, H, W), new memory if anything was mixed; targets (B, N) float32, whose rows sum to 1.
    """
    off = config.label_smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=images.device)
    (classes,) = to_device((labels[:, None],), images.device)
    targets.scatter_(1, classes, 1 - config.label_smoothing + off)
    mixing, choosing, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if mixing >= config.probability or not (config.mixup or config.cutmix):
        return images, targets
    cut = config.cutmix > 0 and (config.mixup == 0 or choosing < config.switch)
    kept = _beta(config.cutmix if cut else config.mixup, generator)
    if cut:
        height, width = images.shape[2:]
        side = math.sqrt(1 - kept)
        middle_y, middle_x = int(down * height), int(right * width)
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(0, middle_y - half_h), min(height, middle_y + half_h)
        left, right_edge = max(0, middle_x - half_w), min(width, middle_x + half_w)
        kept = 1 - (bottom - top) * (right_edge - left) / (height * width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right_edge] = images.flip(0)[:, :, top:bottom, left:right_edge]
    else:
        mixed = images.lerp(images.flip(0), 1 - kept)
    return mixed, targets.lerp(targets.flip(0), 1 - kept)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A number from Beta(alpha, alpha)."""
    first, second = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    total = first + second
    return first / total if total > 0 else 0.5
