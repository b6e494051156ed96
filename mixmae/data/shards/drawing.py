"""What the built-in sets share: an image's random numbers, smooth noise, the finished file, drawing in other processes.

A built-in set is a module with `draw(seed, index, ...)`, which gives a DrawnImage (in scenes.py a DrawnScene), and with
CLASS_NAMES, NUM_TRAIN, NUM_VALIDATION and GENERATOR_VERSION.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class DrawnImage:
    """One image of a built-in set with all that is known about it."""

    jpeg: bytes
    """The image, a baseline JPEG of quality 90."""
    label: int
    """Index into the set's CLASS_NAMES."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels, the last two exclusive."""
    mask_png: bytes
    """A 1-bit PNG of the image's size: 1 where the object is."""


class Draws:
    """Hands out the uniform numbers of one image one after the other."""

    def __init__(self, numbers: FloatArray) -> None:
        self._numbers = numbers
        self._at = 0

    def many(self, count: int) -> FloatArray:
        """The next `count` numbers in [0, 1)."""
        taken = self._numbers[self._at : self._at + count]
        assert len(taken) == count, "more numbers are drawn than were made"
        self._at += count
        return taken

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + float(self.many(1)[0]) * (high - low)

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included."""
        return low + int(self.many(1)[0] * (high - low + 1))


def clouds(draw: Draws, height: int, width: int) -> FloatArray:
    """Smooth noise, about [-1, 1]: (H, W) float32."""
    coarse = (2 * draw.many(25) - 1).astype(np.float32).reshape(5, 5)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def paint(canvas: FloatArray, coverage: FloatArray, colours: FloatArray) -> FloatArray:
    """Lay colours over a canvas (H, W, 3) where coverage (H, W) in [0, 1] says."""
    return canvas + coverage[..., None] * (colours - canvas)


def finished(canvas: FloatArray, coverage: FloatArray, label: int) -> DrawnImage:
    """Encode a canvas with all that is known about it.

    Args: canvas: (H, W, 3) in 0..255.  coverage: of the object, (H, W) in 0..1, at least 0.5 somewhere.
    """
    mask = coverage >= 0.5
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB", colorsubsampling="420")
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    return DrawnImage(jpeg=jpeg, label=label, box=box, mask_png=png.getvalue())


def draw_apart(module: str, *arguments: float, start: int, stop: int) -> Iterator[Any]:
    """Draw the images [start, stop) in a process of their own, so that several ranges can be drawn at once.

    A plain child process: multiprocessing would import the caller's main module again, torch, Ray and all.

    Args: module: of the set.  arguments: of its `draw`, but for the index: the seed and what follows it.
    Yields: what the set's `draw` returns.
    """
    code = f"from mixmae.data.shards.drawing import _serve; _serve({module!r}, {arguments!r}, {start}, {stop})"
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        try:
            for _ in range(start, stop):
                yield pickle.load(child.stdout)
        except EOFError as error:
            raise RuntimeError(f"the process that draws images {start} to {stop} ended early") from error
        finally:
            child.kill()


def _serve(module: str, arguments: tuple[float, ...], start: int, stop: int) -> None:
    draw = import_module(module).draw
    seed, *rest = arguments
    for index in range(start, stop):
        pickle.dump(draw(seed, index, *rest), sys.stdout.buffer)
    sys.stdout.buffer.flush()
