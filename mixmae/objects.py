"""What a detector learns from and what it finds, image by image.

Legend: G objects of an image, D detections, h w the size of an image, H W of the canvas that it lies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HEADER = 2
_NUMBERS = 5


@dataclass(frozen=True, eq=False)
class Target:
    """The objects of a training image."""

    boxes: Tensor
    """(G, 4) float32, x0 y0 x1 y1 in pixels of the canvas."""
    labels: Tensor
    """(G,) int64, class indices from 0."""
    masks: Tensor
    """(G, H, W) bool."""
    size: tuple[int, int]
    """(h, w): the part of the canvas that the image fills, from its upper left corner."""

    def to(self, device: torch.device) -> Target:
        """The same on a device."""
        return Target(
            self.boxes.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.masks.to(device, non_blocking=True),
            self.size,
        )


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects that a model finds in an image, the surest first."""

    boxes: Tensor
    """(D, 4) float32, in pixels."""
    scores: Tensor
    """(D,) float32 in [0, 1]."""
    labels: Tensor
    """(D,) int64, class indices from 0."""
    masks: Tensor | None
    """(D, side, side) float32, probability of each point of the box; None for a model of boxes alone."""


def pack_target(
    boxes: NDArray[np.float32], labels: NDArray[np.int64], masks: NDArray[np.bool_], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Objects as bytes, with eight pixels of a mask in each.

    Args: boxes: (G, 4).  labels: (G,).  masks: (G, H, W).  size: (h, w), as in Target.   Returns: (n,) uint8.
    """
    numbers = np.concatenate([boxes.astype("<f4"), labels.astype("<f4")[:, None]], axis=1)
    bits = np.packbits(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]), axis=1)
    parts = (np.array(size, dtype="<i4"), numbers, bits)
    return np.concatenate([np.frombuffer(np.ascontiguousarray(part).tobytes(), dtype=np.uint8) for part in parts])


def unpack_target(packed: Tensor, canvas: tuple[int, int]) -> Target:
    """Read what pack_target wrote.   Args: packed: (n,) uint8 on the CPU.  canvas: (H, W)."""
    content = packed.numpy().tobytes()
    mask_bytes = -(-canvas[0] * canvas[1] // 8)
    count = (len(content) - 4 * _HEADER) // (4 * _NUMBERS + mask_bytes)
    height, width = np.frombuffer(content, "<i4", _HEADER).tolist()
    numbers = np.frombuffer(content, "<f4", count * _NUMBERS, 4 * _HEADER).reshape(count, _NUMBERS)
    bits = np.frombuffer(content, np.uint8, count * mask_bytes, len(content) - count * mask_bytes)
    masks = np.unpackbits(bits.reshape(count, mask_bytes), axis=1, count=canvas[0] * canvas[1]).astype(np.bool_)
    return Target(
        boxes=torch.from_numpy(numbers[:, :4].astype(np.float32)),
        labels=torch.from_numpy(numbers[:, 4].astype(np.int64)),
        masks=torch.from_numpy(masks.reshape(count, *canvas)),
        size=(height, width),
    )


def unpack_targets(packed: Sequence[Tensor], canvas: tuple[int, int], device: torch.device) -> list[Target]:
    """The targets of a batch, on the device."""
    return [unpack_target(target, canvas).to(device) for target in packed]
