"""COCO instances: a JSON file for each split, with images, annotations and categories.

The split is in the file's name (instances_train2017.json) or in its folder's (Roboflow's train/_annotations.coco.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixmae.data.account import Tally, escaped
from mixmae.data.source import DataError
from mixmae.data.sources.annotations import is_annotation
from mixmae.data.sources.objects.raw import RawImage, RawObject, RawSet, boxes_are_corners, clean
from mixmae.data.sources.splits import split_of
from mixmae.data.sources.storage import Storage, StoredFile

_OTHERS = re.compile(r"(captions|person_keypoints|stuff|panoptic|image_info|deprecated)_.*\.json")
_LOOKS_LIKE = re.compile(rb'"(images|annotations|categories)"')
_HEAD_BYTES = 1 << 16


def read_coco(storage: Storage, root: str, beside: Sequence[StoredFile]) -> RawSet | None:
    """The objects of COCO-style files; None if there are none.   Raises: DataError."""
    files: dict[str, StoredFile] = {}
    contents: dict[str, Any] = {}
    for file in beside:
        base = file.relative.rpartition("/")[2]
        if not base.endswith(".json") or _OTHERS.fullmatch(base) or is_annotation(base):
            continue
        content = _read(storage, file)
        if content is None:
            continue
        split = split_of(file.relative) or "train"
        if split in files:
            raise DataError(
                f"{storage.shown(root)} has several COCO files for its {split} images, {files[split].relative} and "
                f"{file.relative}: keep one"
            )
        files[split], contents[split] = file, content
    if not files:
        return None
    if "train" not in files and len(files) == 1:
        files, contents = {"train": next(iter(files.values()))}, {"train": next(iter(contents.values()))}
    tally = Tally()
    shown = {split: storage.shown(file.path) for split, file in files.items()}
    categories = {split: _categories(content, shown[split]) for split, content in contents.items()}
    known = categories["train"] if "train" in categories else next(iter(categories.values()))
    for split, own in categories.items():
        if not own.items() <= known.items():
            raise DataError(f"{shown[split]} has other categories than the training file: take both of one release")
    ids = tuple(sorted(known))
    names = tuple(known[number] for number in ids)
    if len(set(names)) < len(names):
        names = tuple(f"{number} {known[number]}" for number in ids)
    index = {number: label for label, number in enumerate(ids)}
    splits = {split: _images(content, shown[split], index, tally) for split, content in contents.items()}
    return RawSet(title="COCO", splits=splits, class_names=names, class_ids=ids, tally=tally)


def _read(storage: Storage, file: StoredFile) -> Any:
    """The content of a file in COCO's form with boxes or masks; None for other JSON."""
    try:
        data = storage.read_file(file.path)
    except OSError as error:
        raise DataError(f"{storage.shown(file.path)} cannot be read ({error.strerror or error})") from error
    if not _LOOKS_LIKE.search(data[:_HEAD_BYTES]) and not _LOOKS_LIKE.search(data[-_HEAD_BYTES:]):
        return None
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{storage.shown(file.path)} is not whole JSON ({error}): copy it again") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        return None
    annotations = content["annotations"]
    fits = any(isinstance(item, dict) and ("bbox" in item or "segmentation" in item) for item in annotations)
    return content if fits or not annotations else None


def _categories(content: Any, shown: str) -> dict[int, str]:
    try:
        known = {int(item["id"]): escaped(str(item["name"])) for item in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{shown}: a category has no id or no name ({error!r})") from error
    if not known:
        raise DataError(f"{shown} has no categories: objects need classes")
    return known


def _images(content: Any, shown: str, index: Mapping[int, int], tally: Tally) -> list[RawImage]:
    images: dict[Any, RawImage] = {}
    for item in content["images"]:
        try:
            image = RawImage(
                name=str(item["file_name"]),
                size=(int(item["height"]), int(item["width"])),
                image_id=int(item["id"]) if str(item["id"]).isdecimal() else -1,
            )
            number = item["id"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{shown}: an image has no id, file_name, height or width ({error!r})") from error
        other = images.get(number)
        if other is not None and other.name != image.name:
            raise DataError(f"{shown} gives the number {number} to {other.name} and to {image.name}: give each its own")
        if other is not None:
            tally.add("images are listed twice, and their objects are put together", image.name)
        images.setdefault(number, image)
    if not images:
        raise DataError(f"{shown} names no image")
    corners = boxes_are_corners(_boxes(content["annotations"], images), shown)
    if corners:
        what = "boxes are corners (x0 y0 x1 y1) where COCO has x y width height, and are read as corners"
        tally.add(what, shown, count=len(content["annotations"]))
    for position, item in enumerate(content["annotations"]):
        where = f"annotation {item.get('id', position) if isinstance(item, dict) else position} of {shown}"
        found = _object(item, images, index, tally, where, corners=corners)
        if found is not None:
            images[item["image_id"]].objects.append(found)
    return list(images.values())


def _boxes(
    annotations: Sequence[Any], images: Mapping[Any, RawImage]
) -> Iterator[tuple[Sequence[float], tuple[int, int]]]:
    """The boxes that are four numbers, with the sizes of their images."""
    for item in annotations:
        try:
            a, b, c, d = map(float, item["bbox"])
            yield (a, b, c, d), images[item["image_id"]].size or (1, 1)
        except (KeyError, TypeError, ValueError):
            continue


def _object(
    item: Any, images: Mapping[Any, RawImage], index: Mapping[int, int], tally: Tally, where: str, *, corners: bool
) -> RawObject | None:
    try:
        image = images.get(item["image_id"])
        category = int(item["category_id"])
        segmentation = item.get("segmentation") or []
        box = [float(value) for value in item["bbox"]] if item.get("bbox") else None
        crowd = bool(item.get("iscrowd", 0))
        area = None if item.get("area") is None else float(item["area"])
        number = int(item["id"]) if str(item.get("id", "")).isdecimal() else 0
    except (KeyError, TypeError, ValueError, AttributeError):
        tally.add("annotations without an image, a category or numbers for a box are left out", where)
        return None
    if image is None:
        tally.add("annotations of images that are not listed are left out", where)
        return None
    if category not in index:
        tally.add("annotations of categories that are not listed are left out", where)
        return None
    if box is not None and len(box) != 4:
        tally.add("boxes of other than four numbers are left out", where)
        return None
    if box is not None and not corners:
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    rle = segmentation if isinstance(segmentation, dict) else None
    if rle is not None and tuple(rle.get("size", ())) != image.size:
        tally.add("run-length masks of another size than their image are left out", where)
        rle = None
    polygons = segmentation if isinstance(segmentation, list) else []
    if polygons and not isinstance(polygons[0], list | tuple):  # a single one, without its list
        polygons = [polygons]
    if any(not isinstance(part, list | tuple) for part in polygons):
        tally.add("annotations without an image, a category or numbers for a box are left out", where)
        return None
    return clean(
        tally,
        where,
        image.size,
        box=box,
        polygons=polygons,
        rle=rle,
        label=index[category],
        crowd=crowd,
        area=area,
        number=number,
    )
