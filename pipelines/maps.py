"""What stats.py says of the class-index maps of a set: how much of each class there is, and a page of them, drawn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.pairs import read_pairs
from mixmae.data.source import Source
from mixmae.data.truth import IGNORE, dense_classes, with_maps
from mixmae.machine import usable_cores
from mixmae.panels import GAP_PX, page_of, palette
from mixmae.segmentation.pictures import overlay

PAGE_IMAGES, TILE_PX = 12, 300
_NAMED = 10
_BATCH = 64


def has_maps(source: Source) -> bool:
    """Whether anything is known about the classes of a set's pixels."""
    known = dense_classes(source)
    return known is not None and known.pixels is not None


def count_maps(source: Source, rows: Int64Array) -> dict[str, Any]:
    """Count the classes of images' pixels.   Args: rows: of the source."""
    dense = with_maps(source)
    names = (dense.dense.pixels if dense.dense else None) or ()
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    unusable = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for batch in read_pairs(dense, rows, channels=3, batch_size=_BATCH, pool=pool):
            for item in batch:
                if isinstance(item, BrokenRecord):
                    unusable.append({"where": item.where, "reason": item.reason})
                    continue
                counts = np.bincount(item.indices.ravel(), minlength=256)
                pixels += counts
                images += counts > 0
    return {
        "images": len(rows) - len(unusable),
        "unusable": unusable,
        "ignored_share": float(pixels[IGNORE] / max(1, pixels.sum())),
        "classes": {
            name: {"share": float(pixels[index] / max(1, pixels[:IGNORE].sum())), "images": int(images[index])}
            for index, name in enumerate(names)
        },
    }


def map_lines(entry: dict[str, Any]) -> Iterator[str]:
    """What is printed of it."""
    classes, ignored = entry["classes"], entry["ignored_share"]
    yield f"  masks of {len(classes)} classes on {entry['images']} images, {ignored:.1%} of pixels ignored"
    present = {name: value for name, value in classes.items() if value["images"]}
    for name, value in sorted(present.items(), key=lambda item: -item[1]["share"])[:_NAMED]:
        yield f"    {value['share']:>9.2%}  {name}, on {value['images']} images"
    if len(present) > _NAMED:
        yield f"    and {len(present) - _NAMED} more in stats.json"
    absent = [name for name in classes if name not in present]
    if absent:
        more = ", ..." if len(absent) > _NAMED else ""
        yield f"    {len(absent)} classes have no pixel: {', '.join(absent[:_NAMED])}{more}"
    unusable = entry["unusable"]
    if unusable:
        yield f"    {len(unusable)} images cannot be used with their masks: training takes others instead"
        for record in unusable[:_NAMED]:
            yield f"      {record['where']}: {record['reason']}"


def draw_maps(source: Source, rows: Int64Array) -> Image.Image | None:
    """Some images beside their classes' colours, those of the first rows; None if none of them can be used."""
    dense = with_maps(source)
    colours = palette((dense.dense.pixels if dense.dense else None) or ())
    tiles = []
    for batch in read_pairs(dense, np.sort(rows[:PAGE_IMAGES]), channels=3, batch_size=PAGE_IMAGES):
        for item in batch:
            if not isinstance(item, BrokenRecord):
                height = max(1, round(TILE_PX * item.pixels.shape[0] / item.pixels.shape[1]))
                tile = Image.new("RGB", (2 * TILE_PX, height + GAP_PX), (32, 32, 32))
                for column, picture in enumerate(
                    (Image.fromarray(item.pixels), overlay(item.pixels, item.indices, colours))
                ):
                    tile.paste(picture.resize((TILE_PX, height)), (column * TILE_PX, 0))
                tiles.append(tile)
    return page_of(tiles, columns=2) if tiles else None
