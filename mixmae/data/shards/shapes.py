"""The built-in hard set: one large textured shape on a textured ground, 20 classes, made from (seed, index) alone.

Colour, texture, contrast, size, position and rotation are drawn alike for every class, and a shape is lighter than its
ground as often as darker, so a linear classifier on pixels stays near the chance level (1 in 20): only the outline
distinguishes the classes. Shapes fill 45 to 80 % of the shorter side and have a clear contrast, so a reconstruction can
be compared by eye. What reconstruction learns first (colours, textures) says nothing about these classes, so minutes of
pretraining do not help here (docs/data.md); moths.py is the set that shows learning.
Every image knows its class, the box of its shape and its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from mixmae.data.order import Draw, permutation, uniforms
from mixmae.data.shards.drawing import DrawnImage, Draws, FloatArray, clouds, finished, paint

GENERATOR_VERSION = 1
"""Raised whenever the images of a given (seed, index) change."""

NUM_TRAIN = 4000
NUM_VALIDATION = 1000
MIN_SIDE_PX, MAX_SIDE_PX = 96, 128

_SUPERSAMPLING = 4
_NUM_DRAWS = 256


def draw(seed: int, index: int) -> DrawnImage:
    """Draw one image; any 20 consecutive images from a multiple of 20 hold every class once.

    Args: seed: of the set.  index: >= 0; the default set trains on the first 4,000 and validates on the next 1,000.
    """
    num_classes = len(CLASS_NAMES)
    label = int(permutation(num_classes, Draw.SHAPES, seed, 0, index // num_classes)[index % num_classes])
    draws = Draws(uniforms(_NUM_DRAWS, Draw.SHAPES, seed, 1, index)[0])
    height, width = (draws.integer(MIN_SIDE_PX, MAX_SIDE_PX) for _ in range(2))

    ground_colour, shape_colour = _contrasting_colours(draws)
    canvas = _texture(draws, height, width, ground_colour)
    for _ in range(draws.integer(0, 2)):
        size = draws.between(0.06, 0.14) * min(height, width)
        centre = (draws.between(0, width), draws.between(0, height))
        small = coverage_of(outline_of(draws, draws.integer(0, num_classes - 1), centre, size), height, width)
        canvas = paint(canvas, small, 30 + 195 * draws.many(3).astype(np.float32))

    size = draws.between(0.45, 0.80) * min(height, width)
    outline = outline_of(draws, label, (0.0, 0.0), size)
    low = np.min([part.min(axis=0) for part in outline], axis=0)
    high = np.max([part.max(axis=0) for part in outline], axis=0)
    position = [draws.between(1 - low[axis], side - 1 - high[axis]) for axis, side in enumerate((width, height))]
    coverage = coverage_of([part + position for part in outline], height, width)
    canvas = paint(canvas, coverage, _texture(draws, height, width, shape_colour))

    return finished(canvas, coverage, label)


def _contrasting_colours(draws: Draws) -> tuple[FloatArray, FloatArray]:
    """Two colours, (3,) each in [0, 255], whose brightness differs by 80 to 130; which is lighter is drawn."""
    dark = draws.between(45, 95)
    light = dark + draws.between(80, 130)
    colours = []
    for brightness in (dark, light):
        tint = draws.many(3) - 0.5
        tint -= tint @ np.array([0.299, 0.587, 0.114])  # a tint changes the hue, not the brightness
        colours.append(brightness + 110.0 * tint)
    return (colours[0], colours[1]) if draws.between(0, 1) < 0.5 else (colours[1], colours[0])


def _texture(draws: Draws, height: int, width: int, colour: FloatArray) -> FloatArray:
    """A field of one colour under stripes, checks, rings or clouds: (H, W, 3) float32."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    angle, period = draws.between(0, 2 * math.pi), draws.between(20, 64)
    phases = [2 * math.pi * float(phase) for phase in draws.many(2)]
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    across = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    kind = draws.integer(0, 3)
    if kind == 0:
        pattern = np.sin(along + phases[0])
    elif kind == 1:
        pattern = np.sign(np.sin(along + phases[0]) * np.sin(across + phases[1]))
    elif kind == 2:
        centre_y, centre_x = draws.between(0, height), draws.between(0, width)
        pattern = np.sin(np.sqrt((y - centre_y) ** 2 + (x - centre_x) ** 2) * (2 * math.pi / period) + phases[0])
    else:
        pattern = 1.5 * clouds(draws, height, width)
    strength = draws.between(8, 22)
    shade = strength * pattern + 14.0 * clouds(draws, height, width)
    return np.float32(colour) + shade[..., None] * np.float32(0.7 + 0.6 * draws.many(3))


def coverage_of(outline: list[FloatArray], height: int, width: int) -> FloatArray:
    """How much of each pixel the outline covers; a second part is a hole: (H, W) float32 in [0, 1]."""
    fine = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(fine)
    for part, ink in zip(outline, (255, 0), strict=False):
        pen.polygon([tuple(point) for point in (part * _SUPERSAMPLING).tolist()], fill=ink)
    return np.asarray(fine.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def outline_of(draws: Draws, label: int, centre: tuple[float, float], size: float) -> list[FloatArray]:
    """The class's outline, turned, a little stretched, `size` px in its larger extent: parts of (points, 2) as x, y."""
    angle, stretch = draws.between(0, 2 * math.pi), math.exp(draws.between(-0.15, 0.15))
    skew = draws.between(0, math.pi)
    parts = _OUTLINES[label]
    turn, axis = _rotation(angle), _rotation(skew)
    shape = turn @ axis @ np.diag([stretch, 1 / stretch]) @ axis.T
    parts = [part @ shape.T for part in parts]
    extent = max(np.ptp(parts[0], axis=0))
    middle = (parts[0].max(axis=0) + parts[0].min(axis=0)) / 2
    return [(part - middle) * (size / extent) + np.asarray(centre) for part in parts]


def _rotation(angle: float) -> FloatArray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _polar(radius: Callable[[FloatArray], FloatArray], points: int = 72) -> FloatArray:
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius(angle)[:, None]


def _star(tips: int, inner: float) -> FloatArray:
    angle = np.arange(2 * tips) * math.pi / tips
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


def _polygon(corners: int) -> FloatArray:
    return _polar(np.ones_like, corners)


def _arc(radius: float, start: float, stop: float, centre: tuple[float, float] = (0.0, 0.0)) -> FloatArray:
    angle = np.linspace(start, stop, 40)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius + np.asarray(centre)


def _corners(*points: tuple[float, float]) -> FloatArray:
    return np.array(points, dtype=np.float64)


def _heart() -> FloatArray:
    t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _crescent() -> FloatArray:
    # The inner arc, of a smaller circle further to the left, ends where the outer one ends.
    reach, inner = 2.2, 0.85
    end_x, end_y = math.cos(reach), math.sin(reach)
    centre_x = end_x + math.sqrt(inner**2 - end_y**2)
    lean = math.atan2(end_y, end_x - centre_x)
    return np.concatenate([_arc(1.0, -reach, reach), _arc(inner, lean, -lean, (centre_x, 0.0))])


_CLASSES: dict[str, list[FloatArray]] = {
    "disc": [_polygon(72)],
    "ring": [_polygon(72), 0.55 * _polygon(72)],
    "half_disc": [_arc(1.0, 0.0, math.pi)],
    "crescent": [_crescent()],
    "triangle": [_polygon(3)],
    "square": [_polygon(4)],
    "bar": [_corners((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3))],
    "pentagon": [_polygon(5)],
    "star": [_star(5, 0.42)],
    "sparkle": [_star(4, 0.3)],
    "plus": [_corners(*[(0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1)],
                      *[(-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33), (-0.33, -1)])],
    "arrow": [_corners((1, 0), (0.2, 0.75), (0.2, 0.28), (-1, 0.28), (-1, -0.28), (0.2, -0.28), (0.2, -0.75))],
    "heart": [_heart()],
    "drop": [np.concatenate([_arc(0.62, -2.2, 2.2), _corners((-1.5, 0))])],
    "corner": [_corners((-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1))],
    "tee": [_corners((-1, -1), (1, -1), (1, -0.3), (0.3, -0.3), (0.3, 1), (-0.3, 1), (-0.3, -0.3), (-1, -0.3))],
    "zigzag": [_corners((-1, -1), (0.3, -1), (0.3, 0.3), (1, 0.3), (1, 1), (-0.3, 1), (-0.3, -0.3), (-1, -0.3))],
    "gear": [_polar(lambda a: np.where(np.sin(8 * a) > 0, 1.0, 0.74), 160)],
    "trefoil": [_polar(lambda a: 0.62 + 0.38 * np.cos(3 * a))],
    "bow_tie": [_corners((-1, -0.7), (0, -0.14), (1, -0.7), (1, 0.7), (0, 0.14), (-1, 0.7))],
}  # fmt: skip
CLASS_NAMES: tuple[str, ...] = tuple(_CLASSES)
_OUTLINES = tuple(_CLASSES.values())
