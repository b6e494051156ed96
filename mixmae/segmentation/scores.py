"""How well classes of pixels are found: the confusion matrix of a whole set, and what is read off it.

Scores are of the set, not means over images: pixels are counted first. Counts of several workers add up to those of
one.

Legend: N classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixmae.segmentation.step import IGNORE


def count_pixels(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by their class and what they were taken for.

    Args: predicted, truth: of one shape, integers in [0, N); truth also IGNORE.
    Returns: (N, N) int64, entry (i, j) = pixels of class i predicted as j; ignored pixels are left out.
    """
    counted = truth != IGNORE
    cells = truth[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class PixelScores:
    """The usual figures of segmentation."""

    miou: float
    """Mean of `iou` over the classes that are in the truth or in the prediction."""
    macc: float
    """Mean of `accuracy` over the classes that are in the truth."""
    aacc: float
    """Share of all pixels that are right."""
    iou: Tensor
    """(N,) float64, right pixels over those that are of the class or taken for it; NaN where there are none."""
    accuracy: Tensor
    """(N,) float64, share of the class's pixels that are right; NaN for a class without pixels."""
    pixels: Tensor
    """(N,) int64, pixels of the class."""


def pixel_scores(confusion: Tensor) -> PixelScores:
    """Read the figures off a confusion matrix.   Raises: ValueError if no pixel was counted."""
    if not confusion.sum():
        raise ValueError("no pixel has a class: there is nothing to score")
    right, truth, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou = right.double() / (truth + predicted - right)
    accuracy = right.double() / truth
    return PixelScores(
        miou=iou.nanmean().item(),
        macc=accuracy.nanmean().item(),
        aacc=(right.sum().double() / confusion.sum()).item(),
        iou=iou,
        accuracy=accuracy,
        pixels=truth,
    )
