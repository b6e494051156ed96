"""Objects as annotation files have them: cleaned, and whatever is wrong with them counted and named.

Coordinates are pixels of the image that was annotated, or shares of its sides (YOLO).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmae.data.account import Tally
from mixmae.data.source import DataError

SMALLEST = 1e-3
"""Boxes with a shorter side, in pixels, are empty; of shares, a thousandth of that."""

_MANY = 0.1
"""A convention of boxes that puts more than this share of them outside of their images is not the file's."""
_A_FEW = 8
"""So many boxes without a number above 1 are no accident."""

OUTSIDE = "boxes that are empty or outside of their image are left out"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class RawObject:
    """An object as it is annotated."""

    label: int
    """Class index."""
    box: Box
    """x0 y0 x1 y1."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """x y x y ... each; their union is the object."""
    rle: Mapping[str, Any] | None = None
    """COCO's run lengths, {size, counts}."""
    crowd: bool = False
    area: float | None = None
    """Pixels; None: those of the mask, or of the box."""
    number: int = 0
    """The annotation's own number; 0 for none."""


@dataclass(kw_only=True)
class RawImage:
    """An image's entry in an annotation file."""

    name: str
    """Path as the file has it."""
    size: tuple[int, int] | None
    """(h, w) in pixels that coordinates are for; None: they are shares of the sides."""
    image_id: int
    objects: list[RawObject] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RawSet:
    """What annotation files say, by split."""

    title: str
    """The layout, for people."""
    splits: dict[str, list[RawImage]]
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    """The number of each class in its own file."""
    tally: Tally


def clean(
    tally: Tally,
    where: str,
    size: tuple[int, int] | None,
    *,
    box: Sequence[float] | None,
    polygons: Sequence[Sequence[float]] = (),
    rle: Mapping[str, Any] | None = None,
    **others: Any,
) -> RawObject | None:
    """An object whose numbers can be used; None if they cannot, which is counted.

    Args: where: names the object in notes.  size: (h, w), or None for shares.  box: x0 y0 x1 y1, None: of the polygons.
        others: further fields of RawObject.
    """
    height, width = size or (1, 1)
    kept = [tuple(map(float, polygon)) for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(kept) < len(polygons):
        tally.add("polygons of fewer than three points are left out", where, count=len(polygons) - len(kept))
    if polygons and not kept and rle is None:
        tally.add("objects without a polygon of three points are left out", where, "draw them again")
        return None
    # Far outside coordinates crash pycocotools: they are cut before anything else sees them.
    kept = [
        tuple(min(max(value, 0.0), float(height if index % 2 else width)) for index, value in enumerate(polygon))
        for polygon in kept
    ]
    if box is None:
        if not kept:
            tally.add("objects without a box and without a polygon are left out", where)
            return None
        xs, ys = ([value for polygon in kept for value in polygon[start::2]] for start in (0, 1))
        box = (min(xs), min(ys), max(xs), max(ys))
    x0, y0, x1, y1 = map(float, box)
    if not all(abs(value) < 1e9 for value in (x0, y0, x1, y1)):  # also of NaN
        tally.add("boxes that are no numbers are left out", where)
        return None
    if x1 < x0 or y1 < y0:
        tally.add("boxes have their corners swapped and are turned round", where)
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    cut = (min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height))
    least = SMALLEST if size else SMALLEST / 1000
    if cut[2] - cut[0] < least or cut[3] - cut[1] < least:
        tally.add(OUTSIDE, where)
        return None
    beyond = max(cut[0] - x0, cut[1] - y0, x1 - cut[2], y1 - cut[3])
    if beyond > (1.0 if size else 1e-3):
        tally.add("boxes reach beyond their image and are cut", where)
    return RawObject(box=cut, polygons=tuple(kept), rle=rle, **others)


def boxes_are_corners(boxes: Iterable[tuple[Sequence[float], tuple[int, int]]], shown: str) -> bool:
    """Whether boxes are x0 y0 x1 y1.

    Args: boxes: four numbers each, with the (h, w) of their images.  shown: names the file.
    Raises: DataError if they are neither that nor x y width height.
    """
    outside, wrong, count, largest = 0, 0, 0, 0.0
    for (a, b, c, d), (height, width) in boxes:
        count += 1
        outside += a + c > 1.01 * width + 1 or b + d > 1.01 * height + 1
        wrong += c < a or d < b or c > 1.01 * width + 1 or d > 1.01 * height + 1
        largest = max(largest, a, b, c, d)
    if count >= _A_FEW and 0 < largest <= 1:
        raise DataError(
            f"the {count} boxes of {shown} have no number above 1, so they are shares of their images: write them as "
            "COCO does, [x, y, width, height] in pixels"
        )
    if outside <= _MANY * count:
        return False
    if wrong <= _MANY * count:
        return True
    raise DataError(
        f"{outside} of the {count} boxes of {shown} reach beyond their images as x y width height, and {wrong} make no "
        "sense as x0 y0 x1 y1: write them as COCO does, [x, y, width, height] in pixels"
    )


def put_together(images: Sequence[RawImage], tally: Tally) -> list[RawImage]:
    """The images, each once: objects of one that is listed several times are put together."""
    by_name: dict[str, RawImage] = {}
    for image in images:
        first = by_name.setdefault(image.name, image)
        if first is not image:
            tally.add("images are listed twice, and their objects are put together", image.name)
            first.objects += [item for item in image.objects if item not in first.objects]
    return list(by_name.values())


def number_names(names: set[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Classes that files only name: sorted, and numbered from 0.   Raises: DataError if there are none."""
    ordered = tuple(sorted(names))
    if not ordered:
        raise DataError(f"{where} has no object of any class: there is nothing to learn")
    return {name: index for index, name in enumerate(ordered)}, ordered
