"""Pascal VOC: Annotations/x.xml beside JPEGImages/x.jpg, and lists of the splits in ImageSets/Main.

Boxes are corners in pixels, counted from 1, the last two included. Objects that are marked as difficult are crowds
here: they are not learnt from, and detections of them are not judged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from mixmae.data.account import Tally, escaped
from mixmae.data.source import DataError
from mixmae.data.sources.objects.raw import RawImage, RawSet, clean, number_names
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile

_PATH = re.compile(r"(?P<pre>(?:.*/)?)(?:Annotations|annotations)/(?P<stem>[^/]+)\.xml")


def read_voc(storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]) -> RawSet | None:
    """The objects of a set with an XML file for each image; None if it has none.   Raises: DataError."""
    pairs = {(match["pre"], match["stem"]): file for file in beside if (match := _PATH.fullmatch(file.relative))}
    if not pairs:
        return None
    tally = Tally()
    by_stem: dict[tuple[str, str], str] = {}
    for item in images:
        folder, _, base = item.relative.rpartition("/")
        by_stem[folder.rpartition("/")[0] + "/" if "/" in folder else "", base.rpartition(".")[0]] = item.relative
    found: dict[tuple[str, str], tuple[RawImage, list[tuple[str, dict[str, Any]]]]] = {}
    names: set[str] = set()
    for (prefix, stem), file in sorted(pairs.items()):
        name = by_stem.get((prefix, stem))
        if name is None:
            tally.add("annotations of images that are not there are left out", file.relative)
            continue
        image, objects = _read(storage, file, name, tally)
        image.image_id = len(found)
        found[prefix, stem] = (image, objects)
        names |= {label for label, _ in objects}
    if not found:
        raise DataError(f"{storage.shown(root)} has XML annotations, but none of their images: unpack JPEGImages there")
    index, ordered = number_names(names, storage.shown(root))
    for image, objects in found.values():
        for label, values in objects:
            kept = clean(tally, f"{label} in {image.name}", image.size, label=index[label], **values)
            if kept is not None:
                image.objects.append(kept)
    every = {key: image for key, (image, _) in found.items()}
    splits = _splits(storage, root, every, tally)
    return RawSet(
        title="Pascal VOC",
        splits=splits,
        class_names=ordered,
        class_ids=tuple(range(1, 1 + len(ordered))),
        tally=tally,
    )


def _read(
    storage: Storage, file: StoredFile, name: str, tally: Tally
) -> tuple[RawImage, list[tuple[str, dict[str, Any]]]]:
    shown = storage.shown(file.path)
    try:
        tree = ElementTree.fromstring(storage.read_file(file.path))
        size = (int(tree.findtext("size/height", "")), int(tree.findtext("size/width", "")))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{shown} is not an annotation of Pascal VOC with the size of its image ({error})") from error
    objects: list[tuple[str, dict[str, Any]]] = []
    for item in tree.findall("object"):
        label = escaped((item.findtext("name") or "").strip())
        try:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            tally.add("objects without four numbers for their box are left out", file.relative)
            continue
        if not label:
            tally.add("objects without a name are left out", file.relative)
            continue
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        if difficult:
            tally.add("objects marked as difficult are neither learnt from nor judged", file.relative)
        objects.append((label, {"box": (x0 - 1, y0 - 1, x1, y1), "crowd": difficult}))
    return RawImage(name=name, size=size, image_id=-1), objects


def _splits(
    storage: Storage, root: str, images: dict[tuple[str, str], RawImage], tally: Tally
) -> dict[str, list[RawImage]]:
    """By the lists of ImageSets/Main, else by folders."""
    splits: dict[str, list[RawImage]] = {}
    listed: set[tuple[str, str]] = set()
    for prefix in sorted({prefix for prefix, _ in images}):
        for split, base in (("train", "train"), ("validation", "val"), ("test", "test")):
            try:
                text = storage.read_file(f"{root}/{prefix}ImageSets/Main/{base}.txt").decode(errors="replace")
            except OSError:
                continue
            keys = [key for line in text.splitlines() if line.split() and (key := (prefix, line.split()[0])) in images]
            if keys:
                splits.setdefault(split, []).extend(images[key] for key in keys)
                listed |= set(keys)
    if "train" in splits:
        others = [image for key, image in images.items() if key not in listed]
        if others:
            tally.add("images are in no list of ImageSets and are left out", others[0].name, count=len(others))
        return splits
    splits = {}
    for image in images.values():
        named = filter(None, map(split_of_folder, image.name.split("/")[:-1]))
        splits.setdefault(next(named, "train"), []).append(image)
    return splits
