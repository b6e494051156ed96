"""Pictures of detection: boxes and masks on an image, and truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mixmae.panels import palette

Uint8Array = NDArray[np.uint8]
SHOWN_SCORE = 0.5
"""Detections of a lower score are not drawn."""
TILE_PX = 320
"""Images are shrunk or enlarged to this width in a panel."""
GAP_PX, TITLE_PX = 6, 16
_OPACITY = 0.5
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True, eq=False)
class Drawn:
    """Objects to draw on an image."""

    boxes: NDArray[np.float32]
    """(n, 4) x0 y0 x1 y1 in pixels of the image."""
    labels: NDArray[np.int64]
    """(n,)"""
    scores: NDArray[np.float32] | None = None
    """(n,); None for the truth."""
    masks: Sequence[NDArray[np.bool_]] = ()
    """n of the image's size, or none at all."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a panel."""

    pixels: Uint8Array
    """(h, w, C)."""
    truth: Drawn
    found: Drawn


def draw_objects(pixels: Uint8Array, objects: Drawn, class_names: Sequence[str], width: int = 0) -> Image.Image:
    """An image with the masks, boxes, classes and scores of objects.

    Args: pixels: (h, w, 1, 3 or 4).  width: that the image is resized to; 0 = its own.
    """
    colours = palette(class_names)
    rgb = (pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)).astype(np.float32)
    for mask, label in zip(objects.masks, objects.labels.tolist(), strict=False):
        rgb[mask] = _OPACITY * colours[label] + (1 - _OPACITY) * rgb[mask]
    picture = Image.fromarray(np.round(rgb).astype(np.uint8))
    factor = width / picture.width if width else 1.0
    if width:
        picture = picture.resize((width, max(1, round(picture.height * factor))), Image.Resampling.BILINEAR)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for index, (box, label) in enumerate(zip((objects.boxes * factor).tolist(), objects.labels.tolist(), strict=True)):
        colour = tuple(colours[label].tolist())
        pen.rectangle(box, outline=colour, width=2)
        name = class_names[label] if objects.scores is None else f"{class_names[label]} {objects.scores[index]:.2f}"
        left, top = box[0] + 2, max(0, box[1] - 13)
        pen.rectangle(pen.textbbox((left, top), name, font=font), fill=colour)
        is_dark = colours[label] @ _LUMINANCE < 128
        pen.text((left, top), name, fill=(255, 255, 255) if is_dark else (0, 0, 0), font=font)
    return picture


def detection_panel(rows: Sequence[Row], class_names: Sequence[str]) -> Image.Image:
    """Draw truth and prediction side by side, one image per row."""
    pairs = [
        [draw_objects(row.pixels, objects, class_names, TILE_PX) for objects in (row.truth, row.found)] for row in rows
    ]
    height = TITLE_PX + sum(pair[0].height + GAP_PX for pair in pairs)
    panel = Image.new("RGB", (2 * (TILE_PX + GAP_PX) + GAP_PX, height), (255, 255, 255))
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=11)
    titles = ("truth", f"prediction, score of at least {SHOWN_SCORE:g}")
    for column, title in enumerate(titles):
        pen.text((GAP_PX + column * (TILE_PX + GAP_PX), 2), title, fill=(0, 0, 0), font=font)
    top = TITLE_PX
    for pair in pairs:
        for column, picture in enumerate(pair):
            panel.paste(picture, (GAP_PX + column * (TILE_PX + GAP_PX), top))
        top += pair[0].height + GAP_PX
    return panel
