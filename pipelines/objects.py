"""What stats.py says of the objects of a set: how many, how large, of which classes; and a page of them, drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mixmae.data.annotated import Annotated, object_classes, read_annotated, with_objects
from mixmae.data.chunks import Int64Array
from mixmae.data.rle import decode_rle
from mixmae.data.source import Source
from mixmae.data.truth import dense_classes, read_truths
from mixmae.detection.pictures import Drawn, draw_objects
from mixmae.panels import page_of

SMALL_PX, LARGE_PX = 32, 96
"""COCO's limits: objects of a smaller area than 32 x 32 pixels are small, those of 96 x 96 or more are large."""
PAGE_IMAGES, PAGE_COLUMNS, PAGE_PX = 12, 4, 300
_NAMED = 10


def has_objects(source: Source) -> bool:
    """Whether anything is known about the objects of a set."""
    known = dense_classes(source)
    return known is not None and known.objects is not None


def count_objects(source: Source, rows: Int64Array) -> dict[str, Any]:
    """Count the objects of images.   Args: rows: of the source."""
    names = object_classes(source).objects or ()
    truths = read_truths(with_objects(source), rows)
    known = [truth.objects for truth in truths if truth.objects is not None]
    crowds = sum(int(item.crowd.sum()) for item in known)
    per_image = [int((~item.crowd).sum()) for item in known]
    alone = [(item, ~item.crowd) for item in known]
    areas = np.concatenate([item.areas[own] for item, own in alone] or [np.zeros(0, np.float32)])
    boxes = np.concatenate([item.boxes[own] for item, own in alone] or [np.zeros((0, 4), np.float32)])
    labels = Counter(label for item, own in alone for label in item.labels[own].tolist())
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    return {
        "images": len(known),
        "images_unknown": len(truths) - len(known),
        "images_without": per_image.count(0),
        "objects": sum(per_image),
        "crowds": crowds,
        "without_mask": sum(not mask for item in known for mask in item.masks),
        "per_image": {"mean": float(np.mean(per_image)) if per_image else 0.0, "most": max(per_image, default=0)},
        "sizes": {
            "small": int((areas < SMALL_PX**2).sum()),
            "medium": int(((areas >= SMALL_PX**2) & (areas < LARGE_PX**2)).sum()),
            "large": int((areas >= LARGE_PX**2).sum()),
        },
        "box_side_px": {
            name: float(np.quantile(sides, share)) if len(sides) else None
            for name, share in (("5%", 0.05), ("50%", 0.5), ("95%", 0.95))
        },
        "classes": {name: labels[index] for index, name in enumerate(names)},
    }


def object_lines(entry: dict[str, Any]) -> Iterator[str]:
    """What is printed of it."""
    mean, most = entry["per_image"]["mean"], entry["per_image"]["most"]
    crowds = f", {entry['crowds']} crowds beside them" if entry["crowds"] else ""
    bare = f", {entry['without_mask']} with a box alone" if entry["without_mask"] else ""
    yield (
        f"  {entry['objects']} objects: {mean:.1f} in an image, {most} at most, none in {entry['images_without']}"
        f"{crowds}{bare}"
    )
    if entry["objects"]:
        sizes = ", ".join(f"{count} {name}" for name, count in entry["sizes"].items())
        sides = ", ".join(f"{name} {value:.0f}" for name, value in entry["box_side_px"].items())
        yield f"    by COCO's sizes {sizes}; sides of the boxes in px, quantiles: {sides}"
    absent = [name for name, count in entry["classes"].items() if not count]
    for name, count in sorted(entry["classes"].items(), key=lambda item: -item[1])[:_NAMED]:
        yield f"    {count:>9}  {name}"
    if len(entry["classes"]) > _NAMED:
        yield f"    and {len(entry['classes']) - _NAMED} more in stats.json"
    if absent:
        yield f"    {len(absent)} classes have no object: {', '.join(absent[:_NAMED])}"
    if entry["images_unknown"]:
        yield f"    nothing is known about {entry['images_unknown']} images"


def draw_page(source: Source, rows: Int64Array) -> Image.Image | None:
    """Some images with their objects, those of the first rows; None if none of them can be used."""
    names = object_classes(source).objects or ()
    chosen = np.sort(rows[:PAGE_IMAGES])
    tiles = []
    for batch in read_annotated(with_objects(source), chosen, channels=3, batch_size=PAGE_IMAGES):
        for item in batch:
            if isinstance(item, Annotated):
                objects, size = item.objects, (item.pixels.shape[0], item.pixels.shape[1])
                masks = [decode_rle(mask, size) for mask in objects.masks] if all(objects.masks) else []
                tiles.append(
                    draw_objects(item.pixels, Drawn(objects.boxes, objects.labels, None, masks), names, PAGE_PX)
                )
    return page_of(tiles, columns=PAGE_COLUMNS) if tiles else None
