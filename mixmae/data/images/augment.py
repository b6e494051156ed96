"""Random resized crops and flips that depend on (seed, epoch, row) alone, and the fixed transform of evaluation.

Legend: n images of a block, C channels, H W output size in pixels, h w size of an input image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import Uint8Array
from mixmae.data.order import Draw, uniforms
from mixmae.data.truth import DenseClasses, Truth
from mixmae.patches import image_sides

_ATTEMPTS = 10
_bicubic: Callable[..., torch.Tensor] = torch._C._nn._upsample_bicubic2d_aa
"""torch.nn.functional.interpolate(mode="bicubic", antialias=True) without its checks, and with `out=`."""


@dataclass(frozen=True, kw_only=True)
class BaseAugmentConfig:
    """What is done to the training images of any task."""

    image_size: int | tuple[int, int] = 224
    """Output side in pixels, or (height, width)."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"image_size is {self.image_size}: give a side in pixels, or (height, width)")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}: give a probability in [0, 1]")

    @property
    def size(self) -> tuple[int, int]:
        """Output (height, width) in pixels."""
        return image_sides(self.image_size)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(BaseAugmentConfig):
    """What is done to an image of pretraining; the default is the paper's: a random resized crop and a flip."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the crop as shares of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}: give two shares with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio is {self.crop_ratio}: give two ratios with 0 < low <= high")


@dataclass(frozen=True, kw_only=True)
class JointAugmentConfig(BaseAugmentConfig):
    """What is done to an image and to what is known about its pixels, together."""

    @property
    def nothing(self) -> Uint8Array:
        """The target of an image that nothing is known about."""
        raise NotImplementedError

    def apply(
        self,
        pixels: Uint8Array,
        truth: Truth,
        classes: DenseClasses,
        out: Uint8Array,
        *,
        seed: int,
        epoch: int,
        row: int,
    ) -> Uint8Array:
        """Transform one image and its truth.

        Args: pixels: (h, w, C) uint8, whole and upright.  truth, classes: what is known about it.  out: (C, H, W) uint8
            contiguous, written to.  seed, epoch, row: the keys of all random numbers.
        Returns: (any length,) uint8, what the task wants to know about the image, packed.
        Raises: DecodeError if the truth cannot be used.
        """
        raise NotImplementedError


def draw_crops(
    config: AugmentConfig,
    sizes: Int64Array,
    *,
    seed: int,
    epochs: Int64Array,
    rows: Int64Array,
) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Draw the crop and the flip of every image.

    Args:   sizes: (n, 2) int64, height and width of each image.  epochs, rows: (n,) int64, the keys of the draw.
    Returns: boxes (n, 4) int64 as (top, left, height, width) inside the image; flips (n,) bool.
    Source: torchvision's RandomResizedCrop: ten attempts at a uniform area and a log-uniform ratio, then the largest
            central crop whose ratio is allowed. Ours draws all attempts at once from the hash of (seed, epoch, row).
    """
    draws = uniforms(4 * _ATTEMPTS, Draw.CROP, seed, epochs, rows).reshape(-1, _ATTEMPTS, 4)
    heights, widths = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    low, high = config.crop_scale
    area = heights * widths * (low + draws[..., 0] * (high - low))
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    ratio = np.exp(log_low + draws[..., 1] * (log_high - log_low))
    crop_w = np.rint(np.sqrt(area * ratio))
    crop_h = np.rint(np.sqrt(area / ratio))
    fits = (crop_w >= 1) & (crop_w <= widths) & (crop_h >= 1) & (crop_h <= heights)
    top = np.floor(draws[..., 2] * (heights - crop_h + 1))
    left = np.floor(draws[..., 3] * (widths - crop_w + 1))
    first = np.argmax(fits, axis=1)[:, None]
    drawn = [np.take_along_axis(part, first, axis=1)[:, 0] for part in (top, left, crop_h, crop_w)]
    boxes = np.stack(drawn, axis=1).astype(np.int64)

    lost = ~fits.any(axis=1)
    if lost.any():
        boxes[lost] = _central_crops(sizes[lost], config.crop_ratio)
    flips = uniforms(1, Draw.FLIP, seed, epochs, rows)[:, 0] < config.flip
    return boxes, flips


def _central_crops(sizes: Int64Array, ratios: tuple[float, float]) -> Int64Array:
    """The largest central crops whose width / height lies between the ratios: (n, 4) int64."""
    heights, widths = sizes[:, 0], sizes[:, 1]
    shape = widths / heights
    crop_w = np.where(shape > ratios[1], np.rint(heights * ratios[1]), widths).astype(np.int64)
    crop_h = np.where(shape < ratios[0], np.rint(widths / ratios[0]), heights).astype(np.int64)
    crop_w, crop_h = np.clip(crop_w, 1, widths), np.clip(crop_h, 1, heights)
    return np.stack([(heights - crop_h) // 2, (widths - crop_w) // 2, crop_h, crop_w], axis=1)


def resize_crop(pixels: Uint8Array, box: Int64Array, flip: bool, out: Uint8Array) -> None:
    """Cut a box, resize it with antialiased bicubic, write it channels-first.

    Args: pixels: (h, w, C) uint8.  box: (top, left, height, width).  out: (C, H, W) uint8 contiguous, written to.
    """
    top, left, height, width = box
    resize(pixels[top : top + height, left : left + width], flip, torch.from_numpy(out))


def resize(pixels: Uint8Array, flip: bool, out: torch.Tensor) -> None:
    """Resize with antialiased bicubic, write channels-first.

    Args: pixels: (h, w, C) uint8, contiguous or not.  out: (C, H, W) uint8 contiguous, written to.
    Source: torch's uint8 kernel; mean absolute difference from Pillow's bicubic is about 0.05 of 255.
    """
    # Copying the crop is faster than letting the kernel read rows with gaps.
    source = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if source.shape == out.shape:
        out.copy_(source)
    else:
        _bicubic(source[None], out.shape[1:], False, None, None, out=out[None])
    if flip:
        out.copy_(out.flip(-1))


def centre_crop(pixels: Uint8Array, size: tuple[int, int], crop_pct: float = 0.875) -> Uint8Array:
    """The transform of evaluation: the central part of an image at a fixed size.

    Args:   pixels: (h, w, C) uint8.  size: (H, W).  crop_pct: the crop's side over the side that the image's
            shorter one is resized to: 224 / 256 = 0.875 for ImageNet, 1 for no margin.
    Returns: (C, H, W) uint8.
    Source: resize(256) and centre crop(224) of the usual evaluation. Here both are one resize of the central box,
            without the rounding in between.
    """
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1]) * crop_pct
    crop_h = min(height, max(1, round(size[0] * scale)))
    crop_w = min(width, max(1, round(size[1] * scale)))
    box = np.array([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], dtype=np.int64)
    out: Uint8Array = np.empty((pixels.shape[2], *size), dtype=np.uint8)
    resize_crop(pixels, box, False, out)
    return out
