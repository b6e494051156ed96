"""Images of any size through a model of one input size: overlapping windows, whose scores are averaged.

Legend: C channels, N classes, h w size of an image, H W of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmae.segmentation.upernet import resized


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin on a side of an image: each `stride` further, the last one at the image's end."""
    if side <= window:
        return [0]
    return [*range(0, side - window, stride), side - window]


def slide(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    *,
    window: tuple[int, int],
    stride: int,
    batch_size: int,
) -> list[Tensor]:
    """Score the pixels of images of any size.

    Args:
        model: (B, C, H, W) -> (B, N, h, w) scores at any grid, in evaluation mode.
        images: (C, h, w) each, normalised, on the model's device. What is smaller than the window is padded with 0, the
            mean colour.
        window: H, W.  stride: pixels between windows, down and across.  batch_size: windows at once.
    Returns: (N, h, w) float32 for each image, the mean of the windows' scores.
    Source: the slide mode of segmentation code, with a crop of 512 and a stride of 341 for ADE20K.
    """
    places = [
        (index, top, left)
        for index, image in enumerate(images)
        for top in window_starts(image.shape[-2], window[0], stride)
        for left in window_starts(image.shape[-1], window[1], stride)
    ]
    sums: list[Tensor | None] = [None] * len(images)
    counts = [torch.zeros(image.shape[-2:], device=image.device) for image in images]
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        cuts = [images[index][:, top : top + window[0], left : left + window[1]] for index, top, left in part]
        padded = [F.pad(cut, (0, window[1] - cut.shape[2], 0, window[0] - cut.shape[1])) for cut in cuts]
        scores = resized(model(torch.stack(padded)).float(), window)
        for (index, top, left), cut, score in zip(part, cuts, scores, strict=True):
            height, width = cut.shape[-2:]
            total = sums[index]
            if total is None:
                total = sums[index] = score.new_zeros(len(score), *images[index].shape[-2:])
            total[:, top : top + height, left : left + width] += score[:, :height, :width]
            counts[index][top : top + height, left : left + width] += 1
    return [total / count for total, count in zip(sums, counts, strict=True) if total is not None]
