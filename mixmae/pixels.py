"""Normalising pixels: every model that trains or judges here sees its images through this."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels per channel (RGB), of values in 0..1; the default of all configs."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their std."""


def normalise(images: Tensor, *, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Bring pixels to mean 0 and std 1.

    Args:
        images: (B, C, H, W) uint8.
        mean, std: in units of 0..1, one value per channel; as tensors (C, 1, 1), on the images' device.
    Returns: (B, C, H, W) float32 on the images' device.
    """
    shift, scale = (
        values if isinstance(values, Tensor) else torch.tensor(values, device=images.device)[:, None, None]
        for values in (mean, std)
    )
    return (images.float() / 255 - shift) / scale
