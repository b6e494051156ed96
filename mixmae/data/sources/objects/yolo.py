"""YOLO: a text file for each image, with a line for each object, and a YAML file with the names of the classes.

    data.yaml: names (a list, or a dict of numbers), and train, val, test, which are not needed: folders tell the splits
    images/train/x.jpg beside labels/train/x.txt, or train/images/x.jpg beside train/labels/x.txt
    lines: class, then centre x, centre y, width, height, or a polygon x y x y ...; all shares of the image's sides

An image without a text file, or with an empty one, has no objects. YOLO says nothing about photos that are stored lying
on their side: shares are taken to be of the upright image, as its tools do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mixmae.data.account import Tally, escaped
from mixmae.data.source import DataError
from mixmae.data.sources.objects.raw import RawImage, RawObject, RawSet, clean
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile

_YAML = re.compile(r".*\.ya?ml")
_IMAGE = re.compile(r"(?P<pre>(?:.*/)?)images/(?P<rest>.+)\.[^./]+")


def read_yolo(storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]) -> RawSet | None:
    """The objects of a set in YOLO's form; None if it is not one.   Raises: DataError."""
    labels = {file.relative: file for file in beside if re.fullmatch(r"(?:.*/)?labels/.+\.txt", file.relative)}
    if not labels:
        return None
    names = _names(storage, root, beside)
    tally, splits, used = Tally(), dict[str, list[RawImage]](), set[str]()
    for number, file in enumerate(images):
        match = _IMAGE.fullmatch(file.relative)
        if match is None:
            tally.add("images outside of folders named images are left out", file.relative)
            continue
        label = f"{match['pre']}labels/{match['rest']}.txt"
        image = RawImage(name=file.relative, size=None, image_id=number)
        if label in labels:
            used.add(label)
            image.objects = _objects(storage, labels[label], len(names), tally)
        else:
            tally.add("images have no text file, and no objects", file.relative)
        named = filter(None, map(split_of_folder, file.relative.split("/")[:-1]))
        splits.setdefault(next(named, "train"), []).append(image)
    for label in sorted(labels.keys() - used):
        tally.add("annotations of images that are not there are left out", label)
    if not used:
        raise DataError(
            f"{storage.shown(root)} has YOLO's labels, but none of their images: each labels/x.txt belongs to "
            "images/x.jpg"
        )
    return RawSet(title="YOLO", splits=splits, class_names=names, class_ids=tuple(range(len(names))), tally=tally)


def _names(storage: Storage, root: str, beside: Sequence[StoredFile]) -> tuple[str, ...]:
    """The names of the classes.   Raises: DataError if no file says them."""
    for file in beside:
        if not _YAML.fullmatch(file.relative):
            continue
        try:
            content: Any = yaml.safe_load(storage.read_file(file.path))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{storage.shown(file.path)} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or not content.get("names"):
            continue
        names = content["names"]
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise DataError(f"{storage.shown(file.path)}: names must be numbered from 0 without gaps")
            names = [names[number] for number in range(len(names))]
        return tuple(escaped(str(name)) for name in names)
    for base in ("classes.txt", "labels/classes.txt"):
        try:
            lines = storage.read_file(f"{root}/{base}").decode("utf-8-sig", "surrogateescape").splitlines()
        except OSError:
            continue
        return tuple(escaped(line.strip()) for line in lines if line.strip())
    raise DataError(
        f"{storage.shown(root)} has YOLO's labels, but no data.yaml with the names of the classes: write one, "
        "names: [car, person]"
    )


def _objects(storage: Storage, file: StoredFile, num_classes: int, tally: Tally) -> list[RawObject]:
    try:
        text = storage.read_file(file.path).decode(errors="replace")
    except OSError as error:
        raise DataError(f"{storage.shown(file.path)} cannot be read ({error.strerror or error})") from error
    found: dict[str, RawObject] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file.relative}"
        try:
            label, *values = (float(part) for part in line.split())
        except ValueError:
            tally.add("lines that are no numbers are left out", where)
            continue
        if label != int(label) or not 0 <= label < num_classes:
            tally.add(f"objects of a class beyond the {num_classes} that have names are left out", where)
            continue
        if len(values) == 4:
            x, y, width, height = values
            box, polygons = (x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
        else:
            box, polygons = None, [values]
        item = clean(tally, where, None, box=box, polygons=polygons, label=int(label))
        if item is None:
            continue
        if line.split() and line in found:
            tally.add("lines that repeat another one are left out", where)
        found.setdefault(line, item)
    return list(found.values())
