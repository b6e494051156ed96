"""What is done to an image of segmentation and its class-index map together: resize, crop, flip, colours, padding.

The random numbers depend on (seed, epoch, row) alone. The recipe is the one that UPerNets are usually trained with.
Source: the pipeline of BEiT's and Swin's segmentation configs (docs/segmentation.md). Ours resizes with antialiased
bicubic where theirs is bilinear.

Legend: h w size of an image, H W output size, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mixmae.data.chunks import Int64Array
from mixmae.data.images.augment import JointAugmentConfig, resize
from mixmae.data.images.decode import Uint8Array
from mixmae.data.order import Draw, uniforms
from mixmae.data.truth import IGNORE, DenseClasses, Truth, decode_map

PADDING = {1: (117,), 3: (124, 116, 104), 4: (124, 116, 104, 255)}
"""ImageNet's mean colour, by the number of channels: nearly 0 once it is normalised."""
_ATTEMPTS = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, 0.5, 0.5, 18 / 180


@dataclass(frozen=True, kw_only=True)
class SegmentAugmentConfig(JointAugmentConfig):
    """What is done to an image of segmentation and its mask; the defaults are those of ADE20K."""

    image_size: int | tuple[int, int] = 512
    """Side of the crop in pixels, or (height, width); what a smaller image does not fill is padded, and ignored."""
    shorter_px: int = 512
    """The shorter side that an image is resized to, before its random scale; also in evaluation, without one."""
    longer_px: int = 2048
    """An image whose longer side would become larger is resized to this one instead."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor on the resized image."""
    max_class_share: float = 0.75
    """Largest share that one class may have in a crop: up to ten other crops are tried; 1 takes the first."""
    photometric: float = 0.5
    """Probability of each of four distortions: brightness, contrast, saturation, hue; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.shorter_px <= self.longer_px:
            raise ValueError(
                f"shorter_px is {self.shorter_px} and longer_px {self.longer_px}: give 1 <= shorter <= longer"
            )
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is {self.scale}: give two factors with 0 < low <= high")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"max_class_share is {self.max_class_share}: give a share in (0, 1], 1 for no limit")
        if not 0 <= self.photometric <= 1:
            raise ValueError(f"photometric is {self.photometric}: give a probability in [0, 1]")

    @cached_property
    def nothing(self) -> Uint8Array:
        return np.full(self.size[0] * self.size[1], IGNORE, dtype=np.uint8)

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
        """See JointAugmentConfig.apply.   Returns: (H * W,) uint8, the class of each pixel or IGNORE."""
        indices = decode_map(truth, pixels.shape[:2], len(classes.pixels or ()))
        keys = (seed, np.array([epoch]), np.array([row]))
        draws = uniforms(2 + 2 * (_ATTEMPTS + 1), Draw.RESIZED_CROP, *keys)[0]
        size = resized_size(
            indices.shape, self.shorter_px, self.longer_px, self.scale[0] + draws[0] * np.ptp(self.scale)
        )
        top, left = self._choose_crop(indices, size, draws[2:].reshape(-1, 2))
        height, width = (min(side, most) for side, most in zip(size, self.size, strict=True))
        whole = torch.empty((pixels.shape[2], *size), dtype=torch.uint8)
        resize(pixels, False, whole)
        image = whole[:, top : top + height, left : left + width].numpy()
        crop = _resized_part(indices, size, (top, left, height, width))
        if draws[1] < self.flip:
            image, crop = image[:, :, ::-1], crop[:, ::-1]
        out[:] = np.array(PADDING[len(out)], dtype=np.uint8)[:, None, None]
        out[:, :height, :width] = distort_colours(
            np.ascontiguousarray(image), uniforms(9, Draw.PHOTOMETRIC, *keys)[0], self.photometric
        )
        target = np.full(self.size, IGNORE, dtype=np.uint8)
        target[:height, :width] = crop
        return target.ravel()

    def _choose_crop(self, indices: Uint8Array, size: tuple[int, int], draws: NDArray[np.float64]) -> tuple[int, int]:
        """Top and left, in the resized image, of the first crop whose classes are mixed well enough, or the last."""
        room = [max(side - most, 0) for side, most in zip(size, self.size, strict=True)]
        height, width = (min(side, most) for side, most in zip(size, self.size, strict=True))
        top = left = 0
        for down, right in draws.tolist():
            top, left = int(down * (room[0] + 1)), int(right * (room[1] + 1))
            if self.max_class_share == 1 or not any(room):
                break
            crop = _resized_part(indices, size, (top, left, height, width))
            counts = np.bincount(crop.ravel(), minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        return top, left


def resized_size(size: tuple[int, ...], shorter_px: int, longer_px: int, scale: float = 1.0) -> tuple[int, int]:
    """Give the size (H, W) that an image is resized to.

    Its shorter side becomes shorter_px, or less where its longer one would exceed longer_px; both times a scale.
    """
    factor = scale * min(shorter_px / min(size), longer_px / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resized_part(indices: Uint8Array, size: tuple[int, int], box: tuple[int, int, int, int]) -> Uint8Array:
    """A part of a map as it is after a resize to the nearest pixel.   Args: box: (top, left, height, width) in it."""
    top, left, height, width = box
    rows = nearest(indices.shape[0], size[0])[top : top + height]
    columns = nearest(indices.shape[1], size[1])[left : left + width]
    return indices[np.ix_(rows, columns)]


def nearest(old: int, new: int) -> Int64Array:
    """Of each of `new` pixels, the one of `old` that its centre lies in: (new,) int64."""
    return np.minimum((np.arange(new) + 0.5) * (old / new), old - 1).astype(np.int64)


def distort_colours(image: Uint8Array, draws: NDArray[np.float64], probability: float) -> Uint8Array:
    """Change brightness, contrast, saturation and hue, each with a probability, contrast before or after the last two.

    Args: image: (C, H, W) uint8; of grey ones only brightness and contrast change, alpha never does.  draws: (9,).
    Returns: (C, H, W) uint8.
    Source: the photometric distortion of SSD (Liu et al. 2016) with the ranges that segmentation configs use.
    """
    if not probability:
        return image
    colours, alpha = image[:3], image[3:]
    amounts = 2 * draws[1::2] - 1
    doing = draws[::2][:4] < probability
    if doing[0]:
        colours = _clipped(colours + _BRIGHTNESS * amounts[0])
    first = draws[8] < 0.5
    if doing[1] and first:
        colours = _clipped(colours * (1 + _CONTRAST * amounts[1]))
    if len(colours) == 3 and (doing[2] or doing[3]):
        hsv = np.asarray(Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0))).convert("HSV")).copy()
        if doing[2]:
            hsv[..., 1] = _clipped(hsv[..., 1] * (1 + _SATURATION * amounts[2]))
        if doing[3]:
            hsv[..., 0] += np.uint8(round(256 * _HUE * amounts[3]) % 256)  # it goes round
        colours = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).transpose(2, 0, 1)
    if doing[1] and not first:
        colours = _clipped(colours * (1 + _CONTRAST * amounts[1]))
    return np.concatenate([colours, alpha]) if len(alpha) else colours


def _clipped(values: NDArray[np.floating]) -> Uint8Array:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
