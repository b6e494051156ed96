"""What is done to an image of detection and its objects together: large-scale jitter, crop, padding, flip.

An image is fitted into the canvas, made larger or smaller at random, cut where it does not fit and padded where it does
not fill it. Boxes are those of the masks as they are cut. The random numbers depend on (seed, epoch, row) alone.

Source: Ghiasi et al. 2021 as in detectron2, which uses one random number for both axes of the crop, too. Resizing is
antialiased bicubic here, bilinear there.

Legend: h w size of an image, H W of the canvas, C channels, G objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from mixmae.data.images.augment import JointAugmentConfig, resize
from mixmae.data.images.decode import DecodeError, Uint8Array
from mixmae.data.images.segment_augment import PADDING, nearest
from mixmae.data.order import Draw, uniforms
from mixmae.data.rle import decode_rle
from mixmae.data.truth import DenseClasses, Objects, Truth
from mixmae.objects import pack_target

SMALLEST_PX = 1.0
"""Objects of which less is left, on either axis, are left out."""


@dataclass(frozen=True, kw_only=True)
class DetectAugmentConfig(JointAugmentConfig):
    """What is done to an image of detection and its objects; the defaults are those of COCO."""

    image_size: int | tuple[int, int] = 1024
    """Side of the canvas in pixels, or (height, width); also that of evaluation, where images are fitted into it."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest factor on an image that is fitted into the canvas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is {self.scale}: give two factors with 0 < low <= high")

    @cached_property
    def nothing(self) -> Uint8Array:
        return pack_target(
            np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, *self.size), np.bool_), self.size
        )

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
        """See JointAugmentConfig.apply.   Returns: the objects, as pack_target packs them; crowds are left out."""
        objects = objects_of(truth, pixels.shape[:2], len(classes.objects or ()))
        scale, place, flip = uniforms(3, Draw.LARGE_SCALE_JITTER, seed, np.array([epoch]), np.array([row]))[0].tolist()
        size = fitted_size(pixels.shape[:2], self.size, self.scale[0] + scale * (self.scale[1] - self.scale[0]))
        top, left = (int(place * (max(side - most, 0) + 1)) for side, most in zip(size, self.size, strict=True))
        height, width = (min(side, most) for side, most in zip(size, self.size, strict=True))
        flips = flip < self.flip
        write_canvas(pixels, size, (top, left, height, width), out, flip=flips)

        rows, columns = nearest(pixels.shape[0], size[0])[top : top + height], nearest(pixels.shape[1], size[1])
        columns = columns[left : left + width]
        masks = np.zeros((len(objects.labels), *self.size), dtype=np.bool_)
        boxes = np.zeros((len(objects.labels), 4), dtype=np.float32)
        factors = np.array([size[1] / pixels.shape[1], size[0] / pixels.shape[0]] * 2, dtype=np.float32)
        for index, counts in enumerate(objects.masks):
            if counts:
                part = decode_rle(counts, truth.size)[np.ix_(rows, columns)]
                part = part[:, ::-1] if flips else part
                masks[index, :height, :width] = part
                boxes[index] = box_of(part)
            else:  # a box alone
                x0, y0, x1, y1 = objects.boxes[index] * factors - np.array([left, top] * 2, dtype=np.float32)
                x0, x1 = (width - x1, width - x0) if flips else (x0, x1)
                boxes[index] = np.clip([x0, y0, x1, y1], 0, [width, height] * 2)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_PX).all(axis=1) & ~objects.crowd
        return pack_target(boxes[kept], objects.labels[kept], masks[kept], (height, width))


def objects_of(truth: Truth, size: tuple[int, ...], num_classes: int) -> Objects:
    """The objects of an image, if they fit it.   Raises: DecodeError."""
    objects = truth.objects
    if objects is None:
        raise DecodeError(truth.problem or "nothing is known about its objects")
    if len(objects.labels) and truth.size != size:
        there, here = (f"{height} x {width}" for height, width in (truth.size, size))
        raise DecodeError(f"its objects are for an image of {there} pixels, and it has {here}")
    if ((objects.labels < 0) | (objects.labels >= num_classes)).any():
        raise DecodeError(f"it has an object of class {objects.labels.max()}, and there are {num_classes}")
    return objects


def fitted_size(size: tuple[int, ...], canvas: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The size (H, W) of an image that is fitted into a canvas, times a scale; 1 px at least."""
    factor = scale * min(canvas[0] / size[0], canvas[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def write_canvas(
    pixels: Uint8Array, size: tuple[int, int], crop: tuple[int, int, int, int], out: Uint8Array, *, flip: bool = False
) -> None:
    """Resize an image, and write a part of it to the upper left corner of a canvas.

    Args: pixels: (h, w, C) uint8.  size: (H', W') that it is resized to.  crop: (top, left, height, width) in that.
        out: (C, H, W) uint8, written to; what is left of it gets ImageNet's mean colour.
    """
    top, left, height, width = crop
    whole = torch.empty((pixels.shape[2], *size), dtype=torch.uint8)
    resize(pixels, False, whole)
    part = whole[:, top : top + height, left : left + width].numpy()
    out[:] = np.array(PADDING[len(out)], dtype=np.uint8)[:, None, None]
    out[:, :height, :width] = part[:, :, ::-1] if flip else part


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask's pixels, the last two exclusive; zeros if it has none."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
