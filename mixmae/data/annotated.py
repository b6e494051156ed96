"""Whole images with their objects, as they are stored: for evaluation, and to look at a set before a run.

Legend: h w an image's size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, Uint8Array, decode_image
from mixmae.data.images.detect_augment import objects_of
from mixmae.data.source import DataError, Sample, Source, read_rows
from mixmae.data.truth import DenseClasses, DenseSource, Objects, Truth, dense_classes, read_truths

LOOKED_AT, COUNTED = 64, 2000
"""Images that are decoded when a run begins, and images whose objects are counted, spread over the set."""


@dataclass(frozen=True, eq=False)
class Annotated:
    """An image and its objects."""

    row: int
    where: str
    pixels: Uint8Array
    """(h, w, C) uint8."""
    objects: Objects


def object_classes(source: Source) -> DenseClasses:
    """What a source knows about its objects.   Raises: DataError if it knows nothing."""
    known = dense_classes(source)
    if known is None or known.objects is None:
        raise DataError(
            f"{source.name} has no objects, and detection needs them: give images with the annotations of COCO, Pascal "
            "VOC (where it has masks of classes, too, name its folder Annotations or SegmentationObject), YOLO or "
            "LabelMe, or shards that make_shards made of them (docs/detection.md)."
        )
    return known


def category_ids(known: DenseClasses) -> tuple[int, ...]:
    """The number of each class in its own file, or from 1 where it has none."""
    return known.object_ids or tuple(range(1, 1 + len(known.objects or ())))


def with_objects(source: Source) -> DenseSource:
    """The source, if it has objects.   Raises: DataError if it has not."""
    object_classes(source)
    assert isinstance(source, DenseSource)
    return source


def read_annotated(
    source: DenseSource,
    rows: Int64Array,
    *,
    channels: int,
    batch_size: int,
    pool: Executor | None = None,
) -> Iterator[list[Annotated | BrokenRecord]]:
    """Decode images in batches, with their objects; what cannot be used is a BrokenRecord in its place.

    Args: rows: (N,) int64, best in storage order.  channels: C.  pool: threads that share the decoding.
    """
    num_classes = len(object_classes(source).objects or ())

    def load(row: int, sample: Sample, truth: Truth) -> Annotated | BrokenRecord:
        try:
            pixels = decode_image(sample.data, channels)
            return Annotated(row, sample.where, pixels, objects_of(truth, pixels.shape[:2], num_classes))
        except DecodeError as error:
            return BrokenRecord(row, sample.where, sample.problem or str(error))

    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield list((pool.map if pool else map)(load, part.tolist(), read_rows(source, part), read_truths(source, part)))


def check_objects(source: DenseSource, is_hopeless: Callable[[int, int], bool], *, masks: bool) -> None:
    """Look at the objects of a few images before a run starts, and refuse a set that cannot be learnt from.

    Args: is_hopeless: of the numbers of broken images and of images, as LoopConfig.is_hopeless.  masks: whether each
        object needs a mask.
    Raises: DataError, also if all objects are crowds.
    """
    found = [
        item
        for batch in read_annotated(source, _spread(source, LOOKED_AT), channels=3, batch_size=16)
        for item in batch
    ]
    broken = [item for item in found if isinstance(item, BrokenRecord)]
    if is_hopeless(len(broken), len(found)):
        raise DataError(
            f"{len(broken)} of {len(found)} images of {source.name} that were looked at cannot be used, for example "
            f"{broken[0].where}: {broken[0].reason}; pack the set again from whole images (docs/detection.md)."
        )
    truths = read_truths(source, _spread(source, COUNTED))
    objects = [truth.objects for truth in truths if truth.objects is not None]
    num_objects, num_crowds = (
        sum(len(item.labels) for item in objects),
        sum(int(item.crowd.sum()) for item in objects),
    )
    if not num_objects:
        raise DataError(
            f"none of {len(truths)} images of {source.name} has an object: there is nothing to learn, or to judge by."
        )
    if num_crowds == num_objects:
        raise DataError(
            f"all {num_objects} objects in {len(truths)} images of {source.name} are crowds (iscrowd = 1), which "
            "nothing is learnt from: set iscrowd to 0 for single objects, and pack the set again."
        )
    bare = {row: sum(not mask for mask in truth.objects.masks) for row, truth in enumerate(truths) if truth.objects}
    if masks and any(bare.values()):
        first = next(row for row, count in bare.items() if count)
        (example,) = read_rows(source, _spread(source, COUNTED)[[first]])
        raise DataError(
            f"{sum(bare.values())} of {num_objects} objects in {len(truths)} images of {source.name} have a box and no "
            f"mask, such as in {example.where}: give --detector.no-masks to learn boxes alone, or annotate masks."
        )


def fitted_sides(source: DenseSource, canvas: tuple[int, int]) -> NDArray[np.float64]:
    """(n,) sides of objects in pixels of the canvas (H, W) that images are fitted into, roots of the boxes' areas.

    Those of up to COUNTED images, spread over the set, without crowds.
    """
    sides = [np.zeros(0)]
    for truth in read_truths(source, _spread(source, COUNTED)):
        if truth.objects is not None and min(truth.size) > 0:
            factor = min(canvas[0] / truth.size[0], canvas[1] / truth.size[1])
            boxes = truth.objects.boxes[~truth.objects.crowd].astype(np.float64)
            sides.append(factor * np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)))
    return np.concatenate(sides)


def _spread(source: Source, count: int) -> Int64Array:
    """Rows of a source, as far apart as there is room for."""
    return np.unique(np.linspace(0, source.num_rows - 1, min(count, source.num_rows)).astype(np.int64))


def distinct_ids(truths: Sequence[Truth]) -> list[int]:
    """A number for each image: its own, if all have one and no two have the same; else its row."""
    own = [truth.image_id for truth in truths]
    return own if min(own, default=0) >= 0 and len(set(own)) == len(own) else list(range(len(own)))
