"""Normalising pixels: every model that trains or judges here sees its images through this."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels per channel (RGB), of values in 0..1."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their std."""


def usual_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that pixels (0..1) are normalised with where nothing else is said, one value per channel.

    They are ImageNet's; for one channel those of its grey images (of the luminance, ITU-R 601; the std as if the three
    colours rose and fell together, which they nearly do). A fourth channel, alpha, is brought from 0..1 to -1..1, and
    so are all channels where there are two, or more than four: nobody says that some of them are colours.
    """
    if channels == 1:
        return (0.459,), (0.226,)
    if channels in (3, 4):
        more = (0.5,) * (channels - 3)
        return (*IMAGENET_MEAN, *more), (*IMAGENET_STD, *more)
    return (0.5,) * channels, (0.5,) * channels


def fit_normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for so many channels: these, if they are as many or all channels have the same; else usual ones."""
    if len(mean) == len(std) == channels:
        return mean, std
    if len(set(mean)) == len(set(std)) == 1:
        return mean[:1] * channels, std[:1] * channels
    return usual_normalisation(channels)


def normalise(images: Tensor, *, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Bring pixels to mean 0 and std 1.

    Args:
        images: (B, C, H, W) uint8.
        mean, std: in units of 0..1, one value per channel; as tensors (C, 1, 1), on the images' device.
    Returns: (B, C, H, W) float32 on the images' device.
    """
    shift, scale = (
        values if isinstance(values, Tensor) else _constant(tuple(values), images.device) for values in (mean, std)
    )
    return images.to(torch.float32, copy=True).div_(255).sub_(shift).div_(scale)  # in place: one new tensor, not four


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), kept: a GPU would wait for each copy."""
    return torch.tensor(values, device=device)[:, None, None]
