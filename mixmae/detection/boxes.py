"""The arithmetic of boxes: anchors, offsets, which box belongs to which object, and which boxes to learn from.

Everything here is float32, whatever autocast does around it: above 512 px, bfloat16 numbers are 4 px apart.

Legend: A anchors or proposals of an image, G its objects. A box is x0, y0, x1, y1 in pixels of the canvas, the last two
exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

LARGEST_GROWTH = math.log(1000 / 16)
"""Largest logarithm of a size offset that is applied, so that an early prediction cannot overflow."""
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
ROI_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors on the offsets that the heads learn, of centre and size; 10 and 5 give them about unit variance."""

BACKGROUND, BETWEEN = -1, -2
"""In place of an object's index: belongs to no object; overlaps one too much for background and too little for it."""


def level_anchors(
    size: float, ratios: Sequence[float], grid: tuple[int, int], stride: int, device: torch.device | None = None
) -> Tensor:
    """Boxes of one area around every point of a level.

    Args: size: root of the area in pixels.  ratios: heights over widths.  grid: (H, W) points.  stride: pixels between.
    Returns: (H * W * len(ratios), 4) float32, points in row order; the first point is the upper left pixel's corner.
    """
    ratio = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
    halves = torch.stack([-size / ratio, -size * ratio, size / ratio, size * ratio], dim=1) / 2  # (R, 4)
    y, x = (torch.arange(count, dtype=torch.float32, device=device) * stride for count in grid)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)  # (H*W, 2) as x, y
    return (points.repeat(1, 2)[:, None] + halves).view(-1, 4)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """The offsets that lead from anchors to boxes.   Args: boxes, anchors: (..., 4).   Returns: (..., 4) float32."""
    (centre, size), (anchor_centre, anchor_size) = _centre_and_size(boxes), _centre_and_size(anchors)
    factors = boxes.new_tensor(weights, dtype=torch.float32)
    return torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], dim=-1) * factors


def decode_boxes(offsets: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply offsets to anchors.   Args: offsets: (..., 4) of any float type.  anchors: (..., 4).  Returns: float32."""
    anchor_centre, anchor_size = _centre_and_size(anchors)
    shift, growth = (offsets.float() / offsets.new_tensor(weights, dtype=torch.float32)).split(2, dim=-1)
    centre = anchor_centre + shift * anchor_size
    half = anchor_size * growth.clamp(max=LARGEST_GROWTH).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def match(boxes: Tensor, objects: Tensor, low: float, high: float, *, keep_best: bool = False) -> Tensor:
    """Find the object that each box belongs to.

    Args: boxes: (A, 4).  objects: (G, 4).  low, high: overlaps below which a box is background, and from which on it
        is an object's.  keep_best: the boxes that overlap an object most are that object's, however little it is.
    Returns: (A,) int64, the object's index, BACKGROUND or BETWEEN.
    """
    if not len(objects):
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    overlaps = box_iou(objects.float(), boxes.float())  # (G, A)
    best, owner = overlaps.max(dim=0)
    matched = torch.where(best >= high, owner, torch.where(best < low, BACKGROUND, BETWEEN))
    if keep_best:
        most = overlaps.max(dim=1, keepdim=True).values
        matched = torch.where(((overlaps == most) & (overlaps > 0)).any(dim=0), owner, matched)
    return matched


def sample(matched: Tensor, count: int, positive: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose boxes to learn from: objects' ones up to a share, then background.

    Args: matched: (A,) as match gives it.  count: boxes.  positive: largest share of objects' ones.
        generator: on the device of matched.
    Returns: indices of objects' boxes and of background, int64; fewer than `count` together where there are not enough.
    """
    order = torch.rand(len(matched), generator=generator, device=matched.device).argsort()
    shuffled = matched[order]
    objects = order[shuffled >= 0][: int(count * positive)]
    background = order[shuffled == BACKGROUND][: count - len(objects)]
    return objects, background


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.float().split(2, dim=-1)
    return (low + high) / 2, high - low
