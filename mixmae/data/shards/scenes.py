"""The built-in set for dense tasks: scenes of up to four coloured outlines, made from (seed, index) alone.

Six classes are told apart by outline and by hue, which leaves each class its sixth of the colour circle: they can be
learnt in minutes, and what a scene tests is where things are. Objects are of all sizes, from an eighth to nearly all of
the shorter side, so COCO's small, medium and large all occur; they may cover each other, and one scene in ten is empty.
Nothing is shown that is not in the truth.

Every scene knows each object's box, class and visible pixels, and the class of every pixel: 0 is the ground, class c of
CLASS_NAMES is 1 + c.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mixmae.data.order import Draw, uniforms
from mixmae.data.rle import encode_rle
from mixmae.data.shards.drawing import Draws, FloatArray, clouds, paint
from mixmae.data.shards.shapes import CLASS_NAMES as OUTLINES
from mixmae.data.shards.shapes import coverage_of, outline_of
from mixmae.data.truth import DenseClasses, Objects, Truth, encode_map

GENERATOR_VERSION = 1
"""Raised whenever the images of a given (seed, index) change."""

NUM_TRAIN = 2000
NUM_VALIDATION = 400
PER_SHARD = 400
MIN_SIDE_PX, MAX_SIDE_PX = 144, 192
CLASS_NAMES = ("disc", "square", "triangle", "star", "ring", "plus")
"""Classes of the objects, also the outlines of shapes.py that they have."""
PIXEL_CLASSES = ("ground", *CLASS_NAMES)
DENSE = DenseClasses(pixels=PIXEL_CLASSES, objects=CLASS_NAMES, object_ids=tuple(range(1, 1 + len(CLASS_NAMES))))

MAX_OBJECTS = 4
EMPTY = 0.1
"""Share of scenes without an object."""
_SIZES = (0.12, 0.98)
"""Smallest and largest extent of an object, in shorter sides of the image; all orders of size are equally frequent."""
_MAX_IOU = 0.2
"""Of the boxes of two objects."""
_MIN_VISIBLE = 0.4
"""Share of an object that others leave visible, at least."""
_PLACES = 6
"""Places that are tried for each object; if none is free, the scene has an object less."""
_HUE_SPREAD = 25 / 360
_NUM_DRAWS = 512


@dataclass(frozen=True)
class DrawnScene:
    """One scene with all that is known about it."""

    jpeg: bytes
    """The image, a baseline JPEG of quality 90."""
    truth: Truth


def draw(seed: int, index: int) -> DrawnScene:
    """Draw one scene.

    Args: seed: of the set.  index: >= 0; the default set trains on the first 2,000 and validates on the next 400.
    """
    draws = Draws(uniforms(_NUM_DRAWS, Draw.SCENES, seed, index)[0])
    height, width = (draws.integer(MIN_SIDE_PX, MAX_SIDE_PX) for _ in range(2))
    canvas = _ground(draws, height, width)
    count = 0 if draws.between(0, 1) < EMPTY else draws.integer(1, MAX_OBJECTS)
    labels: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    """What is visible of each object."""
    whole: list[int] = []
    """Pixels of each object, hidden ones included."""
    for _ in range(count):
        label = draws.integer(0, len(CLASS_NAMES) - 1)
        coverage = _place(draws, label, (height, width), masks, whole)
        if coverage is None:
            continue
        canvas = paint(canvas, coverage, _paint_of(draws, label, height, width))
        mask = coverage >= 0.5
        masks = [*(other & ~mask for other in masks), mask]
        whole.append(int(mask.sum()))
        labels.append(label)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB", colorsubsampling="420")
    return DrawnScene(jpeg, _truth(index, labels, masks, (height, width)))


def _truth(index: int, labels: list[int], masks: list[NDArray[np.bool_]], size: tuple[int, int]) -> Truth:
    indices = np.zeros(size, dtype=np.uint8)
    for label, mask in zip(labels, masks, strict=True):
        indices[mask] = 1 + label
    objects = Objects(
        boxes=np.array([_box(mask) for mask in masks], dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        areas=np.array([mask.sum() for mask in masks], dtype=np.float32),
        crowd=np.zeros(len(masks), dtype=np.bool_),
        ids=MAX_OBJECTS * index + np.arange(len(masks), dtype=np.int64) + 1,
        masks=tuple(map(encode_rle, masks)),
    )
    return Truth(segmentation=encode_map(indices), objects=objects, image_id=index, size=size)


def _place(
    draws: Draws, label: int, size: tuple[int, int], masks: list[NDArray[np.bool_]], whole: list[int]
) -> FloatArray | None:
    """How much of each pixel a new object covers: (H, W), at the first place that leaves the others visible."""
    height, width = size
    low, high = (math.log(share * min(size)) for share in _SIZES)
    extent = math.exp(draws.between(low, high))
    outline = outline_of(draws, OUTLINES.index(CLASS_NAMES[label]), (0.0, 0.0), extent)
    lowest, highest = outline[0].min(axis=0), outline[0].max(axis=0)
    for _ in range(_PLACES):
        at = [draws.between(1 - lowest[axis], side - 1 - highest[axis]) for axis, side in enumerate((width, height))]
        coverage = coverage_of([part + at for part in outline], height, width)
        mask = coverage >= 0.5
        box = _box(mask)
        if all(
            _iou(box, _box(other)) <= _MAX_IOU and (other & ~mask).sum() >= _MIN_VISIBLE * pixels
            for other, pixels in zip(masks, whole, strict=True)
        ):
            return coverage
    return None


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the pixels, the last two exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    inside = max(0, min(one[2], two[2]) - max(one[0], two[0])) * max(0, min(one[3], two[3]) - max(one[1], two[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return inside / (sum(areas) - inside)


def _ground(draws: Draws, height: int, width: int) -> FloatArray:
    """A textured ground between grey and brown: (H, W, 3) float32."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    angle, period = draws.between(0, math.pi), draws.between(16, 48)
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    stripes = np.sin(along + draws.between(0, 2 * math.pi)) * draws.between(0, 10)
    brightness, brown = draws.between(70, 170), draws.between(0, 0.18)
    colour = brightness * np.array([1 + brown, 1.0, 1 - 1.5 * brown], dtype=np.float32)
    return colour + (stripes + 16 * clouds(draws, height, width) + 8 * clouds(draws, height, width))[..., None]


def _paint_of(draws: Draws, label: int, height: int, width: int) -> FloatArray:
    """The colours of an object: its class's hue, more or less, under clouds; (H, W, 3) float32."""
    hue = label / len(CLASS_NAMES) + draws.between(-_HUE_SPREAD, _HUE_SPREAD)
    colour = colorsys.hsv_to_rgb(hue % 1.0, draws.between(0.55, 0.95), draws.between(0.45, 0.95))
    return 255 * np.array(colour, dtype=np.float32) + 14 * clouds(draws, height, width)[..., None]
