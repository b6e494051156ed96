"""Pascal VOC: Annotations/x.xml beside JPEGImages/x.jpg, and lists of the splits in ImageSets/Main.

Where most images have an XML file right beside them, x.xml and x.jpg, as labelling tools store it, folders tell the
splits.

Boxes are corners in pixels, counted from 1, the last two included. Objects that are marked as difficult are crowds
here: they are not learnt from, and detections of them are not judged. The pixels of the n-th object of an XML file have
the value n in SegmentationObject/x.png; these masks are read where that folder is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from mixmae.data.account import Tally, escaped
from mixmae.data.images.decode import DecodeError, image_size
from mixmae.data.rle import encode_rle
from mixmae.data.source import DataError
from mixmae.data.sources.image_sets import read_image_sets
from mixmae.data.sources.masks import read_values
from mixmae.data.sources.objects.raw import RawImage, RawSet, clean, number_names
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile
from mixmae.data.truth import IGNORE

_PATH = re.compile(r"(?P<pre>(?:.*/)?)(?:Annotations|annotations)/(?P<stem>[^/]+)\.xml")


_INSTANCES = "SegmentationObject"
_AGREE = 0.25
"""A mask whose own box overlaps that of its object by less, intersection over union, is of another one."""

Objects = list[tuple[int, str, dict[str, Any]]]
"""Number in the XML file, counted from 1, label, and values for `clean`."""


def read_voc(
    storage: Storage,
    root: str,
    beside: Sequence[StoredFile],
    images: Sequence[StoredFile],
    *,
    masks: bool = False,
) -> RawSet | None:
    """The objects of a set with an XML file for each image; None if it has none.

    Args: masks: whether to take the images with a mask in SegmentationObject alone, with their masks.
    Raises: DataError.
    """
    pairs = {(match["pre"], match["stem"]): file for file in beside if (match := _PATH.fullmatch(file.relative))}
    by_stem: dict[tuple[str, str], str] = {}
    instances: dict[tuple[str, str], StoredFile] = {}
    if pairs:
        for item in images:
            folder, _, base = item.relative.rpartition("/")
            parent, _, last = folder.rpartition("/")
            key = (f"{parent}/" if parent else "", base.rpartition(".")[0])
            if not last.startswith("Segmentation") and (last == "JPEGImages" or key not in by_stem):  # those are masks
                by_stem[key] = item.relative
            elif last == _INSTANCES:
                instances[key] = item
    else:
        by_stem = {_folder_and_stem(item): item.relative for item in images}
        pairs = {_folder_and_stem(file): file for file in beside if file.relative.endswith(".xml")}
        both = sorted(pairs.keys() & by_stem.keys())
        if 2 * len(both) < len(by_stem) or not both or b"<annotation" not in storage.read_file(pairs[both[0]].path):
            return None  # of some other kind
    tally = Tally()
    paths = {item.relative: item.path for item in images}
    found: dict[tuple[str, str], tuple[RawImage, Objects]] = {}
    names: set[str] = set()
    for (prefix, stem), file in sorted(pairs.items()):
        name = by_stem.get((prefix, stem))
        if name is None:
            tally.add("annotations of images that are not there are left out", file.relative)
            continue
        if masks and (prefix, stem) not in instances:
            tally.add("images have no mask in SegmentationObject and are left out", name)
            continue
        image, objects = _read(storage, file, name, paths[name], tally)
        if masks:
            objects = _with_masks(storage, instances[prefix, stem], image, objects, tally)
        image.image_id = len(found)
        found[prefix, stem] = (image, objects)
        names |= {label for _, label, _ in objects}
    folders = {prefix for prefix, _ in found}
    for key in sorted(by_stem.keys() - pairs.keys()):
        if key[0] in folders:
            remedy = "an XML file without objects says that an image has none"
            tally.add("images have no XML file and are left out", by_stem[key], remedy)
    if not found:
        raise DataError(f"{storage.shown(root)} has XML annotations, but none of their images: unpack JPEGImages there")
    index, ordered = number_names(names, storage.shown(root))
    for image, objects in found.values():
        for _, label, values in objects:
            kept = clean(tally, f"{label} in {image.name}", image.size, label=index[label], **values)
            if kept is not None and kept in image.objects:
                tally.add("objects that repeat another one are left out", f"{label} in {image.name}")
            elif kept is not None:
                image.objects.append(kept)
    every = {key: image for key, (image, _) in found.items()}
    lists = "Segmentation" if masks else "Main"
    splits = _splits(storage, root, f"ImageSets/{lists}", every, by_stem.keys(), tally)
    return RawSet(
        title="Pascal VOC",
        splits=splits,
        class_names=ordered,
        class_ids=tuple(range(1, 1 + len(ordered))),
        tally=tally,
    )


def _folder_and_stem(file: StoredFile) -> tuple[str, str]:
    folder, mark, base = file.relative.rpartition("/")
    return folder + mark, base.rpartition(".")[0]


def _read(storage: Storage, file: StoredFile, name: str, path: str, tally: Tally) -> tuple[RawImage, Objects]:
    """An XML file's image and objects.   Args: name, path: of the image."""
    shown = storage.shown(file.path)
    try:
        tree = ElementTree.fromstring(storage.read_file(file.path))
        size = tuple(int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise DataError(
            f"{shown} is not an annotation of Pascal VOC ({error}): correct it, or delete it to leave its image out"
        ) from error
    if min(size) < 1:
        what = "XML files do not say the size of their image, and their boxes are taken to be of the upright image"
        tally.add(what, file.relative)
        try:
            size = image_size(storage.read_file(path))
        except (OSError, DecodeError):
            size = (1, 1)  # the image is counted as broken
    objects: Objects = []
    for number, item in enumerate(tree.findall("object"), 1):
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
        objects.append((number, label, {"box": (x0 - 1, y0 - 1, x1, y1), "crowd": difficult}))
    return RawImage(name=name, size=(size[0], size[1]), image_id=-1), objects


def _with_masks(storage: Storage, file: StoredFile, image: RawImage, objects: Objects, tally: Tally) -> Objects:
    """The objects that have pixels, with their masks."""
    try:
        values = read_values(storage.read_file(file.path))
    except (OSError, DecodeError) as error:
        tally.add(
            "masks in SegmentationObject cannot be read, and none of their objects is used", f"{image.name}: {error}"
        )
        return []
    if values.shape != image.size:
        tally.add("masks in SegmentationObject are of another size than their image, and are not used", image.name)
        return []
    found: Objects = []
    for number, label, value in objects:
        pixels = values == number
        where = f"{label} in {image.name}"
        if number == IGNORE or not pixels.any():
            tally.add("objects without a pixel in SegmentationObject are left out", where)
            continue
        rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        own = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
        if _overlap(own, np.array(value["box"])) < _AGREE:
            tally.add("objects whose pixels in SegmentationObject are not those of their box are left out", where)
            continue
        rle = {"size": list(values.shape), "counts": encode_rle(pixels)}
        found.append((number, label, {**value, "rle": rle}))
    return found


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes."""
    inside = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return float(inside / max((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - inside, 1e-9))


def _splits(
    storage: Storage,
    root: str,
    lists: str,
    images: dict[tuple[str, str], RawImage],
    there: Collection[tuple[str, str]],
    tally: Tally,
) -> dict[str, list[RawImage]]:
    """By lists, else by folders.   Args: lists: their folder.  there: also of images without annotations."""
    splits: dict[str, list[RawImage]] = {}
    listed: set[tuple[str, str]] = set()
    for prefix in sorted({prefix for prefix, _ in images}):
        usable, known = ({stem for pre, stem in keys if pre == prefix} for keys in (images, there))
        for split, stems in read_image_sets(storage, f"{root}/{prefix}{lists}", usable, known, tally).items():
            splits.setdefault(split, []).extend(images[prefix, stem] for stem in stems)
            listed |= {(prefix, stem) for stem in stems}
    if splits:
        others = [image for key, image in images.items() if key not in listed]
        if others:
            tally.add("images are in no list of ImageSets and are left out", others[0].name, count=len(others))
        return splits
    for image in images.values():
        named = filter(None, map(split_of_folder, image.name.split("/")[:-1]))
        splits.setdefault(next(named, "train"), []).append(image)
    return splits
