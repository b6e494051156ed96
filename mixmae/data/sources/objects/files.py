"""Image files with objects as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from mixmae.data.account import Met, Note, escaped
from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, image_size
from mixmae.data.rle import decode_rle
from mixmae.data.source import DataError, short_digest
from mixmae.data.sources.folders import FilesSource, ImageFile, open_files
from mixmae.data.sources.objects.coco import read_coco
from mixmae.data.sources.objects.labelme import read_labelme
from mixmae.data.sources.objects.raw import RawImage, RawObject, RawSet, put_together
from mixmae.data.sources.objects.voc import read_voc
from mixmae.data.sources.objects.yolo import read_yolo
from mixmae.data.sources.splits import split_of, split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile
from mixmae.data.truth import DenseClasses, Objects, Truth, fitted


@dataclass(frozen=True, kw_only=True)
class ObjectListing:
    """Images with objects, by split."""

    layout: str
    splits: dict[str, list[tuple[StoredFile, RawImage]]]
    classes: DenseClasses
    notes: tuple[Note, ...]


def list_objects(
    storage: Storage,
    root: str,
    beside: Sequence[StoredFile],
    images: Sequence[StoredFile],
    *,
    voc_masks: bool = False,
) -> ObjectListing | None:
    """Find the images and objects in a folder; None if nothing is known about objects.

    Args:
        beside: files that may be annotations.  images: all image files.
        voc_masks: whether masks of objects are meant where the set is Pascal VOC's.
    Raises: DataError for annotations that are recognised but cannot be used.
    """
    if not storage.is_local or not images:
        return None
    found = read_coco(storage, root, beside)
    if found is not None:
        return _listing(storage, root, _with_paths(storage, root, found, images), images)
    for read in (partial(read_voc, masks=voc_masks), read_yolo, read_labelme):
        found = read(storage, root, beside, images)
        if found is not None:
            return _listing(storage, root, found, images)
    return None


def _with_paths(storage: Storage, root: str, found: RawSet, images: Sequence[StoredFile]) -> RawSet:
    """The same with the names of images as paths below the root, without those that are not there."""
    paths = {image.relative for image in images}
    splits = {}
    for split, part in found.splits.items():
        base = _base(split, [image.name for image in part], paths)
        there = []
        for image in part:
            if base + image.name in paths:
                image.name = base + image.name
                there.append(image)
            else:
                found.tally.add("images of the annotations are not there and are left out", image.name)
        if not there:
            raise DataError(
                f"none of the {len(part)} {split} images of the annotations is in {storage.shown(root)}, such as "
                f"{part[0].name}: unpack the archives of images there"
            )
        splits[split] = there
    return replace(found, splits=splits)


def _base(split: str, names: Sequence[str], paths: set[str]) -> str:
    """The folder that names are relative to: where most of a few of them are, best in one with the split's name."""
    some = names[:: len(names) // 64 + 1]
    bases = {path.removesuffix(name) for name in some for path in paths if f"/{path}".endswith(f"/{name}")}

    def fit(base: str) -> tuple[int, bool, int]:
        folder = base.rstrip("/")
        named = split in (split_of(f"{folder}.x"), *map(split_of_folder, folder.split("/")))
        return sum(base + name in paths for name in some), named, -len(base)

    return max(sorted(bases), key=fit, default="")


def _listing(storage: Storage, root: str, found: RawSet, images: Sequence[StoredFile]) -> ObjectListing:
    by_path = {image.relative: image for image in images}
    splits = {
        split: [(by_path[image.name], image) for image in put_together(part, found.tally)]
        for split, part in found.splits.items()
    }
    listed = {image.name for part in found.splits.values() for image in part}
    unlisted = [path for path in by_path if path not in listed]
    if unlisted and found.title == "COCO":
        found.tally.add("images that no annotation file lists are left out", unlisted[0], count=len(unlisted))
    classes = DenseClasses(objects=found.class_names, object_ids=found.class_ids)
    return ObjectListing(layout=found.title, splits=splits, classes=classes, notes=found.tally.notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectFiles(FilesSource):
    """Image files with objects."""

    annotated: tuple[RawImage, ...]
    dense: DenseClasses

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256()
        for image in self.annotated:
            content.update(repr(image).encode(errors="backslashreplace"))
        return short_digest("\n".join([FilesSource.digest.fget(self), content.hexdigest(), repr(self.dense)]))  # type: ignore[attr-defined]

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        """The objects of rows of one chunk, upright as the images are."""
        first = int(self.chunks.starts[chunk])
        rows = [first + int(row) for row in rows_in_chunk]
        contents = self.storage.read_files([self._path(row) for row in rows])
        return [self._truth(self.annotated[row], content) for row, content in zip(rows, contents, strict=True)]

    def _truth(self, image: RawImage, content: bytes | OSError) -> Truth:
        try:
            upright = (0, 0) if isinstance(content, OSError) else image_size(content)
        except DecodeError:
            upright = (0, 0)
        if isinstance(content, OSError) or upright == (0, 0):  # the image is counted as broken
            return Truth(image_id=image.image_id, problem="its image cannot be read")
        size = image.size or upright
        try:
            objects = as_objects(image.objects, size, shares=image.size is None)
        except (ValueError, TypeError) as error:
            return Truth(image_id=image.image_id, problem=f"a mask cannot be used: {error}")
        return fitted(Truth(objects=objects, image_id=image.image_id, size=size), content, content)


def as_objects(raw: Sequence[RawObject], size: tuple[int, int], *, shares: bool) -> Objects:
    """Objects with their masks as run lengths.

    Args: size: (h, w) of the image.  shares: whether coordinates are shares of it.
    Raises: ValueError for run lengths that are none.
    """
    height, width = size
    scale = np.array([width, height] * 2 if shares else [1, 1, 1, 1], dtype=np.float64)
    boxes = np.array([item.box for item in raw], dtype=np.float64).reshape(-1, 4) * scale
    masks = [_rle(item, size, shares=shares) for item in raw]
    areas = [
        item.area
        if item.area is not None
        else float(decode_rle(mask, size).sum())
        if mask
        else float((box[2] - box[0]) * (box[3] - box[1]))
        for item, mask, box in zip(raw, masks, boxes, strict=True)
    ]
    return Objects(
        boxes=boxes.astype(np.float32),
        labels=np.array([item.label for item in raw], dtype=np.int64),
        areas=np.array(areas, dtype=np.float32),
        crowd=np.array([item.crowd for item in raw], dtype=np.bool_),
        ids=np.array([item.number for item in raw], dtype=np.int64),
        masks=tuple(masks),
    )


def _rle(item: RawObject, size: tuple[int, int], *, shares: bool) -> bytes:
    """An object's mask in COCO's compressed form; empty for a box alone."""
    if not item.polygons and item.rle is None:
        return b""
    coding = _coding()
    height, width = size
    parts: list[Any] = []
    if item.rle is not None:
        counts = item.rle["counts"]
        if isinstance(counts, list):
            parts.append(coding.frPyObjects({"size": list(size), "counts": counts}, height, width))
        else:
            encoded = counts if isinstance(counts, bytes) else str(counts).encode("ascii")
            decode_rle(encoded, size)  # pycocotools would read past the end of damaged ones
            parts.append({"size": list(size), "counts": encoded})
    if item.polygons:
        factors = (width, height) if shares else (1, 1)
        pixels = [[value * factors[index % 2] for index, value in enumerate(part)] for part in item.polygons]
        parts += coding.frPyObjects(pixels, height, width)
    merged = parts[0] if len(parts) == 1 else coding.merge(parts)
    return bytes(merged["counts"])


def _coding() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "polygons become masks with pycocotools, which is not installed: pip install 'mixmae[dense]'"
        ) from error
    return mask


def open_objects(
    storage: Storage, root: str, name: str, split: str, listing: ObjectListing, met: Sequence[Met] = ()
) -> ObjectFiles:
    """Images with objects as a source."""
    pairs = listing.splits[split]
    base = open_files(storage, root, name, [ImageFile(file, -1) for file, _ in pairs], None, met)
    values = {field.name: getattr(base, field.name) for field in fields(base)}
    values["name"] = escaped(name)
    return ObjectFiles(**values, annotated=tuple(image for _, image in pairs), dense=listing.classes)
