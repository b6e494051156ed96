"""The embedded default set: one large textured shape on a textured ground, 20 classes, made from (seed, index) alone.

Colour, texture, contrast, size, position and rotation are drawn alike for every class, and a shape is lighter than its
ground as often as darker, so a linear classifier on pixels stays near the chance level (1 in 20): only the outline
distinguishes the classes. Shapes fill 45 to 80 % of the shorter side and have a clear contrast, so a reconstruction can
be compared by eye.
Every image knows its class, the box of its shape and its pixels.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mixmae.data.order import Draw, permutation, uniforms

GENERATOR_VERSION = 1
"""Raised whenever the images of a given (seed, index) change."""

NUM_TRAIN = 4000
NUM_VALIDATION = 1000
MIN_SIDE_PX, MAX_SIDE_PX = 96, 128

FloatArray = NDArray[np.floating[Any]]

_SUPERSAMPLING = 4
_NUM_DRAWS = 256


@dataclass(frozen=True)
class ShapeImage:
    """One image of the set with all that is known about it."""

    jpeg: bytes
    """The image, a baseline JPEG of quality 90."""
    label: int
    """Index into CLASS_NAMES."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels, the last two exclusive."""
    mask_png: bytes
    """A 1-bit PNG of the image's size: 1 where the shape is."""


def shape_image(seed: int, index: int) -> ShapeImage:
    """Make one image; any 20 consecutive images from a multiple of 20 hold every class once.

    Args: seed: of the set.  index: >= 0; the default set trains on the first 4,000 and validates on the next 1,000.
    """
    num_classes = len(CLASS_NAMES)
    label = int(permutation(num_classes, Draw.SHAPES, seed, 0, index // num_classes)[index % num_classes])
    draw = _Draws(uniforms(_NUM_DRAWS, Draw.SHAPES, seed, 1, index)[0])
    height, width = (draw.integer(MIN_SIDE_PX, MAX_SIDE_PX) for _ in range(2))

    ground_colour, shape_colour = _contrasting_colours(draw)
    canvas = _texture(draw, height, width, ground_colour)
    for _ in range(draw.integer(0, 2)):
        size = draw.between(0.06, 0.14) * min(height, width)
        centre = (draw.between(0, width), draw.between(0, height))
        small = _coverage(_outline(draw, draw.integer(0, num_classes - 1), centre, size), height, width)
        canvas = _paint(canvas, small, 30 + 195 * draw.many(3).astype(np.float32))

    size = draw.between(0.45, 0.80) * min(height, width)
    outline = _outline(draw, label, (0.0, 0.0), size)
    low = np.min([part.min(axis=0) for part in outline], axis=0)
    high = np.max([part.max(axis=0) for part in outline], axis=0)
    position = [draw.between(1 - low[axis], side - 1 - high[axis]) for axis, side in enumerate((width, height))]
    coverage = _coverage([part + position for part in outline], height, width)
    canvas = _paint(canvas, coverage, _texture(draw, height, width, shape_colour))

    mask = coverage >= 0.5
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB", colorsubsampling="420")
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    return ShapeImage(jpeg=jpeg, label=label, box=box, mask_png=png.getvalue())


def shape_images(seed: int, start: int, stop: int) -> Iterator[ShapeImage]:
    """Make the images [start, stop) in a process of their own, so that several ranges can be made at once.

    A plain child process: multiprocessing would import the caller's main module again, torch, Ray and all.
    """
    code = f"from mixmae.data.shards.shapes import _serve; _serve({seed}, {start}, {stop})"
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        try:
            for _ in range(start, stop):
                yield ShapeImage(*pickle.load(child.stdout))
        except EOFError as error:
            raise RuntimeError(f"the process that draws the shapes {start} to {stop} ended early") from error
        finally:
            child.kill()


def _serve(seed: int, start: int, stop: int) -> None:
    for index in range(start, stop):
        image = shape_image(seed, index)
        pickle.dump((image.jpeg, image.label, image.box, image.mask_png), sys.stdout.buffer)
    sys.stdout.buffer.flush()


class _Draws:
    """Hands out the uniform numbers of one image one after the other."""

    def __init__(self, numbers: FloatArray) -> None:
        self._numbers = numbers
        self._at = 0

    def many(self, count: int) -> FloatArray:
        taken = self._numbers[self._at : self._at + count]
        assert len(taken) == count, "raise _NUM_DRAWS"
        self._at += count
        return taken

    def between(self, low: float, high: float) -> float:
        return low + float(self.many(1)[0]) * (high - low)

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included."""
        return low + int(self.many(1)[0] * (high - low + 1))


def _contrasting_colours(draw: _Draws) -> tuple[FloatArray, FloatArray]:
    """Two colours, (3,) each in [0, 255], whose brightness differs by 80 to 130; which is lighter is drawn."""
    dark = draw.between(45, 95)
    light = dark + draw.between(80, 130)
    colours = []
    for brightness in (dark, light):
        tint = draw.many(3) - 0.5
        tint -= tint @ np.array([0.299, 0.587, 0.114])  # a tint changes the hue, not the brightness
        colours.append(brightness + 110.0 * tint)
    return (colours[0], colours[1]) if draw.between(0, 1) < 0.5 else (colours[1], colours[0])


def _texture(draw: _Draws, height: int, width: int, colour: FloatArray) -> FloatArray:
    """A field of one colour under stripes, checks, rings or clouds: (H, W, 3) float32."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    angle, period = draw.between(0, 2 * math.pi), draw.between(20, 64)
    phases = [2 * math.pi * float(phase) for phase in draw.many(2)]
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    across = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    kind = draw.integer(0, 3)
    if kind == 0:
        pattern = np.sin(along + phases[0])
    elif kind == 1:
        pattern = np.sign(np.sin(along + phases[0]) * np.sin(across + phases[1]))
    elif kind == 2:
        centre_y, centre_x = draw.between(0, height), draw.between(0, width)
        pattern = np.sin(np.sqrt((y - centre_y) ** 2 + (x - centre_x) ** 2) * (2 * math.pi / period) + phases[0])
    else:
        pattern = 1.5 * _clouds(draw, height, width)
    strength = draw.between(8, 22)
    shade = strength * pattern + 14.0 * _clouds(draw, height, width)
    return np.float32(colour) + shade[..., None] * np.float32(0.7 + 0.6 * draw.many(3))


def _clouds(draw: _Draws, height: int, width: int) -> FloatArray:
    """Smooth noise, about [-1, 1]: (H, W) float32."""
    coarse = (2 * draw.many(25) - 1).astype(np.float32).reshape(5, 5)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _paint(canvas: FloatArray, coverage: FloatArray, colours: FloatArray) -> FloatArray:
    return canvas + coverage[..., None] * (colours - canvas)


def _coverage(outline: list[FloatArray], height: int, width: int) -> FloatArray:
    """How much of each pixel the outline covers; a second part is a hole: (H, W) float32 in [0, 1]."""
    fine = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(fine)
    for part, ink in zip(outline, (255, 0), strict=False):
        pen.polygon([tuple(point) for point in (part * _SUPERSAMPLING).tolist()], fill=ink)
    return np.asarray(fine.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _outline(draw: _Draws, label: int, centre: tuple[float, float], size: float) -> list[FloatArray]:
    """The class's outline, turned, a little stretched, `size` px in its larger extent: parts of (points, 2) as x, y."""
    angle, stretch = draw.between(0, 2 * math.pi), math.exp(draw.between(-0.15, 0.15))
    skew = draw.between(0, math.pi)
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
