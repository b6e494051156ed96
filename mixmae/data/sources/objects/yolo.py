"""YOLO: a text file for each image, with a line for each object, and a YAML file with the names of the classes.

    data.yaml: names (a list, or a dict of numbers); train, val, test: folders of images, or lists of them, which tell
        the splits if they are there; else the names of folders do
    images/train/x.jpg beside labels/train/x.txt, or train/images/x.jpg beside train/labels/x.txt
    lines: class, then centre x, centre y, width, height, or a polygon x y x y ...; all shares of the image's sides

Of poses (kpt_shape in data.yaml) the boxes are read. An image without a text file, or with an empty one, has no
objects. YOLO says nothing about photos that are stored lying on their side: shares are taken to be of the upright
image, as its tools do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mixmae.data.account import Tally, escaped
from mixmae.data.source import DataError
from mixmae.data.sources.objects.raw import OUTSIDE, RawImage, RawObject, RawSet, clean
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile

_A_FEW = 8
"""So many boxes outside of their images are no accident, if they are most."""
_YAML = re.compile(r".*\.ya?ml")
_IMAGE = re.compile(r"(?P<pre>(?:.*/)?)images/(?P<rest>.+)\.[^./]+")


def read_yolo(storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]) -> RawSet | None:
    """The objects of a set in YOLO's form; None if it is not one.   Raises: DataError."""
    labels = {file.relative: file for file in beside if re.fullmatch(r"(?:.*/)?labels/.+\.txt", file.relative)}
    if not labels:
        return None
    tally, splits = Tally(), dict[str, list[RawImage]]()
    used, described = set[str](), set[str]()
    file, content = _description(storage, beside)
    names = _names(storage, root, file, content, tally)
    there = [item for item in images if _IMAGE.fullmatch(item.relative)]
    for item in images:
        if not _IMAGE.fullmatch(item.relative):
            tally.add("images outside of folders named images are left out", item.relative)
    split_of = _splits(storage, file, content, {image.relative for image in there}, tally)
    for number, item in enumerate(there):
        if item.relative not in split_of:
            what = "images are in no folder or list that data.yaml names, and are left out"
            tally.add(what, item.relative, "name their folder as train, val or test there")
            continue
        match = _IMAGE.fullmatch(item.relative)
        assert match is not None
        label = f"{match['pre']}labels/{match['rest']}.txt"
        split = split_of[item.relative]
        image = RawImage(name=item.relative, size=None, image_id=number)
        if label in labels:
            used.add(label)
            described.add(split)
            image.objects = _objects(storage, labels[label], len(names), tally, poses="kpt_shape" in content)
        else:
            tally.add("images have no text file, and no objects", item.relative)
        splits.setdefault(split, []).append(image)
    known = {f"{match['pre']}labels/{match['rest']}.txt" for i in there if (match := _IMAGE.fullmatch(i.relative))}
    for label in sorted(labels.keys() - known):
        if not label.endswith("labels/classes.txt"):
            tally.add("annotations of images that are not there are left out", label)
    for split in sorted(splits.keys() - described - {"test"}):
        what = "splits have no text file at all, so that none of their images has an object"
        tally.add(what, split, "put their labels there, or leave their images out")
    if not used:
        raise DataError(
            f"{storage.shown(root)} has YOLO's labels, but none of their images: each labels/x.txt belongs to "
            "images/x.jpg"
        )
    outside = next((note for note in tally.notes if note.what == OUTSIDE), None)
    num_objects = sum(len(image.objects) for part in splits.values() for image in part)
    if outside is not None and outside.count > max(num_objects, _A_FEW):
        raise DataError(
            f"{outside.count} of the {outside.count + num_objects} boxes of {storage.shown(root)} are outside of their "
            f"images, such as {outside.example}: YOLO's numbers are shares of the sides of an image, from 0 to 1, and "
            "not pixels"
        )
    return RawSet(title="YOLO", splits=splits, class_names=names, class_ids=tuple(range(len(names))), tally=tally)


def _description(storage: Storage, beside: Sequence[StoredFile]) -> tuple[StoredFile | None, dict[str, Any]]:
    """The YAML file that names the classes, and its content; (None, {}) if there is none.   Raises: DataError."""
    for file in beside:
        if not _YAML.fullmatch(file.relative):
            continue
        try:
            content: Any = yaml.safe_load(storage.read_file(file.path))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(
                f"{storage.shown(file.path)} cannot be read ({' '.join(str(error).split())}): correct it"
            ) from error
        if isinstance(content, dict) and content.get("names"):
            return file, content
    return None, {}


def _names(
    storage: Storage, root: str, file: StoredFile | None, content: dict[str, Any], tally: Tally
) -> tuple[str, ...]:
    """The names of the classes.   Raises: DataError if no file says them."""
    if file is not None:
        names = content["names"]
        if isinstance(names, str):
            raise DataError(f"{storage.shown(file.path)}: names is one text: write a list, names: [car, person]")
        if isinstance(names, dict):
            numbered = {str(number): name for number, name in names.items()}
            if numbered.keys() != {str(number) for number in range(len(names))}:
                raise DataError(f"{storage.shown(file.path)}: names must be numbered from 0 without gaps")
            names = [numbered[str(number)] for number in range(len(names))]
        stated = content.get("nc")
        if stated is not None and stated != len(names):
            what = f"nc in data.yaml is not the {len(names)} of its names, which count"
            tally.add(what, f"nc: {stated} in {file.relative}", "correct it, or add the names that are missing")
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


def _splits(
    storage: Storage, file: StoredFile | None, content: dict[str, Any], images: set[str], tally: Tally
) -> dict[str, str]:
    """The split of each image that is used: as the YAML file says, or as the folders are called.

    Paths in these files are those of somebody's computer, so a folder is found by the end of its path.
    """
    by_folder = {
        image: next(filter(None, map(split_of_folder, image.split("/")[:-1])), None) for image in sorted(images)
    }
    found: dict[str, str] = {}
    for split, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        stated = content.get(key)
        for place in stated if isinstance(stated, list) else [stated] if stated else []:
            inside = _images_at(storage, file, f"{content.get('path') or ''}/{place}", images)
            if not inside:
                what = "folders or lists of images that data.yaml names are not there"
                tally.add(what, f"{key}: {place}", "folders named train, val and test are found without it")
            again = sum(found.setdefault(image, split) != split for image in sorted(inside))
            if again:
                what = "images are of two splits in data.yaml, and are used in the first of train, val and test"
                tally.add(what, f"{key}: {place}", "give each split images of its own", count=again)
    if "train" not in found.values():
        return {image: found.get(image) or split or "train" for image, split in by_folder.items()}
    return found | {image: split for image, split in by_folder.items() if image not in found and split is not None}


def _images_at(storage: Storage, file: StoredFile | None, place: str, images: set[str]) -> set[str]:
    """The images in a folder or a list, which is the longest end of its path that is there."""
    folder = file.path.rpartition("/")[0] if file is not None else ""
    for end in _ends(place):
        if end.endswith(".txt"):
            try:
                lines = storage.read_file(f"{folder}/{end}").decode("utf-8-sig", "surrogateescape").splitlines()
            except OSError:
                continue
            return {end for line in lines for end in _ends(line.strip()) if end in images}
        inside = {image for image in images if image.startswith(f"{end}/")}
        if inside:
            return inside
    return set()


def _ends(path: str) -> list[str]:
    """The ends of a path, the longest one first: a/b/c, b/c, c."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _objects(storage: Storage, file: StoredFile, num_classes: int, tally: Tally, *, poses: bool) -> list[RawObject]:
    """The objects of a text file.   Args: poses: whether points follow the four numbers of each box."""
    try:
        text = storage.read_file(file.path).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{storage.shown(file.path)} cannot be read ({error.strerror or error})") from error
    found: list[RawObject] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file.relative}"
        try:
            label, *values = (float(part) for part in line.split())
        except ValueError:
            tally.add("lines that are no numbers are left out", where)
            continue
        if not label.is_integer() or not 0 <= label < num_classes:
            tally.add(f"objects of a class beyond the {num_classes} that have names are left out", where)
            continue
        if len(values) == 5:
            tally.add("boxes are followed by a fifth number, which is not used", where)
        if (poses and len(values) > 4) or len(values) == 5:
            values = values[:4]
        if len(values) < 4 or len(values) % 2:
            what = "lines that are neither a class and a box nor a class and a polygon are left out"
            tally.add(what, where, "write class x y width height, or class x y x y x y ...")
            continue
        if len(values) == 4:
            x, y, width, height = values
            box, polygons = (x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
        else:
            box, polygons = None, [values]
        item = clean(tally, where, None, box=box, polygons=polygons, label=int(label))
        if item is None:
            continue
        if item in found:
            tally.add("lines that repeat another one are left out", where)
        else:
            found.append(item)
    return found
