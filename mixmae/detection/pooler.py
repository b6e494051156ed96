"""Cutting regions of the pyramid out to one size each: aligned RoIAlign on the level that fits the region.

Legend: B images, C channels, R regions of all images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL_PX, CANONICAL_STRIDE = 224, 16
"""A region of 224 x 224 px is read from the level with 16 px between points (Lin et al. 2017)."""


def region_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """The index of the level that each region is read from: twice the side, one level further up.

    Args: boxes: (R, 4) float32.  strides: of the levels, each twice the one before.   Returns: (R,) int64.
    """
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    base = math.log2(CANONICAL_STRIDE / strides[0])
    level = (base + (sides / CANONICAL_PX + 1e-8).log2()).floor()
    return level.clamp(0, len(strides) - 1).to(torch.int64)


def pool_regions(
    features: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int], output_size: int
) -> Tensor:
    """Sample each region on a grid.

    torchvision's pooler is not used: it shifts regions by half a pixel, and takes the levels' scales from the first
    batch that it sees. Here they are fixed.

    Args: features: of each level, (B, C, H, W).  boxes: B tensors (R_b, 4) float32.  strides: of the levels.
        output_size: side of the grid.
    Returns: (R, C, output_size, output_size), dtype of features, images in order.
    """
    regions = torch.cat(
        [torch.cat([box.new_full((len(box), 1), image), box], dim=1) for image, box in enumerate(boxes)]
    )  # (R, 5)
    levels = region_levels(regions[:, 1:], strides)
    pooled = features[0].new_zeros(len(regions), features[0].shape[1], output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        # Also where a level has no region: every parameter takes part in every step, as distributed training needs.
        chosen = torch.nonzero(levels == level)[:, 0]
        # In float32 on a GPU too, whatever autocast says; 0: as many samples as a cell has points.
        part = roi_align(feature.float(), regions[chosen], output_size, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = pooled.index_copy(0, chosen, part.to(pooled.dtype))
    return pooled
