"""Pictures of segmentation: colours of classes, overlays, and truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mixmae.panels import palette
from mixmae.segmentation.step import IGNORE

Uint8Array = NDArray[np.uint8]
TILE_PX = 180
"""Images are shrunk or enlarged to this width in a panel."""
GAP_PX, TITLE_PX = 6, 16
_IGNORED = (255, 255, 255)
_RIGHT, _WRONG = (235, 235, 235), (214, 39, 40)
_OPACITY = 0.6
_MOST_NAMES = 24


def overlay(pixels: Uint8Array, indices: Uint8Array, colours: Uint8Array) -> Image.Image:
    """An image under the colours of its pixels' classes.   Args: pixels: (H, W, 1, 3 or 4).  indices: (H, W)."""
    rgb = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    mixed = _OPACITY * colours[indices].astype(np.float32) + (1 - _OPACITY) * rgb
    return Image.fromarray(np.round(mixed).astype(np.uint8))


@dataclass(frozen=True)
class Shown:
    """One row of a panel."""

    pixels: Uint8Array
    """(H, W, C)."""
    truth: Uint8Array
    """(H, W) class indices or IGNORE."""
    predicted: Uint8Array
    """(H, W) class indices."""


def segmentation_panel(rows: Sequence[Shown], class_names: Sequence[str]) -> Image.Image:
    """Draw image, truth, prediction and errors side by side, one image per row, with the names of the classes shown."""
    colours = palette(class_names)
    titles = ("image", "truth", "prediction", "errors")
    font = ImageFont.load_default(size=11)
    heights = [max(1, round(TILE_PX * row.truth.shape[0] / row.truth.shape[1])) for row in rows]
    seen = np.unique(np.concatenate([part.ravel() for row in rows for part in (row.truth, row.predicted)]))
    names = [int(index) for index in seen if index != IGNORE and index < len(class_names)][:_MOST_NAMES]
    width = len(titles) * (TILE_PX + GAP_PX) + GAP_PX
    per_line = 4
    legend = -(-len(names) // per_line) * TITLE_PX
    panel = Image.new("RGB", (width, TITLE_PX + sum(heights) + GAP_PX * len(rows) + legend + 2), (255, 255, 255))
    pen = ImageDraw.Draw(panel)
    for column, title in enumerate(titles):
        pen.text((GAP_PX + column * (TILE_PX + GAP_PX), 2), title, fill=(0, 0, 0), font=font)
    top = TITLE_PX
    for row, height in zip(rows, heights, strict=True):
        plain = row.pixels[..., :3] if row.pixels.shape[2] >= 3 else np.repeat(row.pixels[..., :1], 3, axis=2)
        errors = np.where((row.truth == row.predicted)[..., None], _RIGHT, _WRONG)
        errors = np.where((row.truth == IGNORE)[..., None], _IGNORED, errors).astype(np.uint8)
        tiles = [
            (Image.fromarray(np.ascontiguousarray(plain)), Image.Resampling.BILINEAR),
            *(
                (Image.fromarray(part), Image.Resampling.NEAREST)
                for part in (colours[row.truth], colours[row.predicted])
            ),
            (Image.fromarray(errors), Image.Resampling.NEAREST),
        ]
        for column, (tile, filter_) in enumerate(tiles):
            panel.paste(tile.resize((TILE_PX, height), filter_), (GAP_PX + column * (TILE_PX + GAP_PX), top))
        top += height + GAP_PX
    for number, index in enumerate(names):
        left, down = GAP_PX + (number % per_line) * (TILE_PX + GAP_PX), top + (number // per_line) * TITLE_PX
        pen.rectangle((left, down + 2, left + 10, down + 12), fill=tuple(colours[index].tolist()))
        pen.text((left + 15, down), str(class_names[index])[:24], fill=(0, 0, 0), font=font)
    return panel
