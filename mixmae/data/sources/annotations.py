"""Image sets as they are published, with the classes and splits in annotation files beside the images.

    iNaturalist  train2018.json, val2018.json (likewise 2019): COCO's form, one class per image; optionally
                 categories.json, whose names replace the obfuscated ones of the competition
    Places365    places365_train_standard.txt (or _challenge), places365_val.txt: "/a/airfield/00000001.jpg 0"
    Places205    train_places205.csv, val_places205.csv: "a/abbey/gsun_0003586c3eedd97457b2d729ebfe18b5.jpg 0"
    Tiny-ImageNet  val/val_annotations.txt: "val_0.JPEG", a tab, the class "n03444034", and a box; the classes and
                 the splits are folders (folders.py)

The files are found by these names, anywhere below the folder that is opened, and so are the images: the archives
unpack to train_val2018/, data_256/ and val_256/, data/vision/torralba/deeplearning/images256/. Images
that no list names (test sets, whose classes are not public) are left out.

Source: the READMEs of visipedia/inat_comp (2018, 2019) and zhoubolei/places_devkit, torchvision's Places365 (names of
files), public readers of Places205 (mmselfsup, HIRL).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixmae.data.source import DataError
from mixmae.data.sources.folders import ImageFile, Listing, unsorted
from mixmae.data.sources.storage import Storage, StoredFile

ANNOTATION_SUFFIXES = frozenset((".json", ".txt", ".csv"))

Entries = list[tuple[str, int]]
"""Images by the name that a list gives them, each with its class index."""

_CATEGORIES = "categories.json"
_TINY = "val_annotations.txt"


@dataclass(frozen=True)
class _Kind:
    """A family of sets."""

    title: str
    lists: dict[str, re.Pattern[str]]
    """Of each split, the name of its annotation file."""
    names: str
    """The same for people."""
    folder: re.Pattern[str]
    """A folder of its images: if it is there without the lists, these are missing."""


_KINDS = (
    _Kind(
        "iNaturalist",
        {"train": re.compile(r"train20\d\d\.json"), "validation": re.compile(r"val20\d\d\.json")},
        "train2018.json and val2018.json (or those of its year)",
        re.compile(r"(^|/)train_val20\d\d/"),
    ),
    _Kind(
        "Places365",
        {
            "train": re.compile(r"places365_train_(standard|challenge)\.txt"),
            "validation": re.compile(r"places365_val\.txt"),
        },
        "places365_train_standard.txt and places365_val.txt",
        re.compile(r"(^|/)data_(256|large)(_standard|_challenge)?/[a-z]/"),
    ),
    _Kind(
        "Places205",
        {"train": re.compile(r"train_places205\.csv"), "validation": re.compile(r"val_places205\.csv")},
        "train_places205.csv and val_places205.csv",
        re.compile(r"(^|/)images256/[a-z]/"),
    ),
)


def is_annotation(path: str) -> bool:
    """Whether a file has the name of a set's annotation file."""
    name = path.rpartition("/")[2]
    return any(pattern.fullmatch(name) for kind in _KINDS for pattern in kind.lists.values())


def read_annotated(
    storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]
) -> Listing | None:
    """The splits and classes of a set with annotation files, or None if it is not one.

    Args:   beside: files below root that may be annotations.  images: all image files below root.
    Raises: DataError if a list is missing or damaged, or does not fit the images.
    """
    kind = _kind_of(storage, root, beside, images)
    if kind is None:
        return None
    lists: dict[str, StoredFile] = {}
    for split, pattern in kind.lists.items():
        found = [file for file in beside if pattern.fullmatch(file.relative.rpartition("/")[2])]
        if not found:
            raise DataError(
                f"{storage.shown(root)} looks like {kind.title}, but the list of its {split} images is missing: put "
                f"{kind.names} there, or name a folder of images below it to take those without classes"
            )
        if len(found) > 1:
            raise DataError(
                f"{storage.shown(root)} has several lists of {split} images, {found[0].relative} and "
                f"{found[1].relative}: keep one set with one list in a folder"
            )
        lists[split] = found[0]
    if not images:
        raise DataError(
            f"{storage.shown(root)} has {lists['train'].relative}, but no image: unpack the archives of images there"
        )
    if lists["train"].relative.endswith(".json"):
        entries, class_names = _read_coco(storage, lists, beside)
    else:
        entries, class_names = _read_lines(storage, lists)
    by_name = {image.relative: image for image in images}
    splits = {split: _match(storage, root, lists[split], part, by_name) for split, part in entries.items()}
    return Listing(splits, class_names)


def label_validation(storage: Storage, beside: Sequence[StoredFile], listing: Listing) -> Listing:
    """Give the validation images of Tiny-ImageNet, which are all in one folder, the classes of their list.

    Args:    beside: files that may be the list.  listing: of the folders.
    Returns: the same listing where there is no such list.   Raises: DataError if the list is damaged.
    """
    file = next((file for file in beside if file.relative.rpartition("/")[2] == _TINY), None)
    if file is None or listing.class_names is None:
        return listing
    index = {name: number for number, name in enumerate(listing.class_names)}
    labels: dict[str, int] = {}
    for number, line in enumerate(storage.read_file(file.path).decode(errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        if line.strip() and rest.partition("\t")[0].strip() not in index:
            raise DataError(
                f"line {number} of {storage.shown(file.path)} is {line.strip()[:80]!r}, not an image and one of the "
                f"{len(index)} classes: download it again"
            )
        labels[name] = index.get(rest.partition("\t")[0].strip(), -1)
    folder = file.relative.rpartition("/")[0]

    def labelled(image: ImageFile) -> ImageFile:
        base = image.file.relative.rpartition("/")[2]
        inside = image.file.relative.startswith(f"{folder}/")
        return replace(image, label=labels[base]) if inside and image.label < 0 and base in labels else image

    splits = {split: [labelled(image) for image in images] for split, images in listing.splits.items()}
    known = {unsorted(split) for split, images in splits.items() if all(image.label >= 0 for image in images)}
    return Listing(splits, listing.class_names, tuple(note for note in listing.notes if note.what not in known))


def _kind_of(storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]) -> _Kind | None:
    """The kind of which there are lists, or else images."""
    names = {file.relative.rpartition("/")[2] for file in beside}
    kinds = [k for k in _KINDS if any(pattern.fullmatch(name) for pattern in k.lists.values() for name in names)]
    if len(kinds) > 1:
        titles = " and ".join(kind.title for kind in kinds)
        raise DataError(f"{storage.shown(root)} holds several sets, {titles}: name the folder of one")
    if not kinds:
        folders = {image.relative.rpartition("/")[0] + "/" for image in images}
        kinds = [kind for kind in _KINDS if any(kind.folder.search(folder) for folder in folders)]
    return kinds[0] if kinds else None


def _read_coco(
    storage: Storage, lists: dict[str, StoredFile], beside: Sequence[StoredFile]
) -> tuple[dict[str, Entries], tuple[str, ...]]:
    """Images and classes of COCO-style files, classes in the order of their ids."""
    known: dict[int, str] = {}
    index: dict[int, int] = {}
    entries: dict[str, Entries] = {}
    for split, file in lists.items():
        shown = storage.shown(file.path)
        content = _read_json(storage, file)
        try:
            categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
            classes = {entry["image_id"]: int(entry["category_id"]) for entry in content["annotations"]}
            images = [(str(entry["file_name"]), entry["id"]) for entry in content["images"]]
            num_annotations = len(content["annotations"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{shown} is not in COCO's form (images, annotations with image_id and category_id, categories with id "
                f"and name): download it again"
            ) from error
        if not known:
            known, index = categories, {number: label for label, number in enumerate(sorted(categories))}
        elif not categories.items() <= known.items():
            raise DataError(f"{shown} has other categories than the train file: take both of one year")
        if not images:
            raise DataError(f"{shown} names no image: download it again")
        bare = [name for name, number in images if number not in classes]
        strange = [name for name, number in images if number in classes and classes[number] not in known]
        for some, problem in (
            (bare, "have no annotation"),
            (strange, "have a category that is not in its list of categories"),
        ):
            if some:
                raise DataError(
                    f"{len(some)} of the {len(images)} images of {shown} {problem}, such as {some[0]}: download the "
                    f"file again"
                )
        if num_annotations > len(classes):
            raise DataError(
                f"{shown} has {num_annotations} annotations of {len(classes)} images: one class per image can be read"
            )
        entries[split] = [(name, index[classes[number]]) for name, number in images]
    names = {**known, **_better_names(storage, beside, known)}
    ordered = [names[number] for number in sorted(names)]
    if len(set(ordered)) < len(ordered):  # sets are joined by the names of their classes
        ordered = [f"{number} {names[number]}" for number in sorted(names)]
    return entries, tuple(ordered)


def _better_names(storage: Storage, beside: Sequence[StoredFile], known: dict[int, str]) -> dict[int, str]:
    """The names in categories.json for the same ids; empty without that file."""
    file = next((file for file in beside if file.relative.rpartition("/")[2] == _CATEGORIES), None)
    if file is None:
        return {}
    shown = storage.shown(file.path)
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in _read_json(storage, file)}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{shown} is not a list of categories with id and name: download it again, or delete it"
        ) from error
    if names.keys() != known.keys():
        raise DataError(
            f"{shown} has {len(names)} categories that are not the {len(known)} of the annotations: take the one of "
            f"the same year, or delete it"
        )
    return names


def _read_json(storage: Storage, file: StoredFile) -> Any:
    try:
        return json.loads(storage.read_file(file.path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{storage.shown(file.path)} cannot be read ({reason}): download it again") from error


def _read_lines(storage: Storage, lists: dict[str, StoredFile]) -> tuple[dict[str, Entries], tuple[str, ...]]:
    """Images and classes of lists with a path and a class index per line.

    A class is named after the folder of its training images: a/airfield is airfield, a/arena/rodeo is arena/rodeo.
    """
    entries: dict[str, Entries] = {}
    names: tuple[str, ...] = ()
    for split, file in lists.items():
        shown = storage.shown(file.path)
        try:
            lines = storage.read_file(file.path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{shown} cannot be read ({error}): download it again") from error
        part = entries[split] = []
        for number, line in enumerate(lines, 1):
            name, _, label = line.strip().rpartition(" ")
            if name and label.isdecimal():
                part.append((name.lstrip("/"), int(label)))
            elif line.strip():
                raise DataError(
                    f"line {number} of {shown} is {line.strip()[:80]!r}, not a path and the number of a class: "
                    f"download the list again"
                )
        if not part:
            raise DataError(f"{shown} names no image: download it again")
        if split == "train":
            folders: dict[int, str] = {}
            for name, index in part:
                folders.setdefault(index, name.rpartition("/")[0])
            if sorted(folders) != list(range(len(folders))) or len(set(folders.values())) < len(folders):
                raise DataError(
                    f"the classes of {shown} are not numbered from 0 without gaps, each with a folder of its own: "
                    f"download the list again, whole"
                )
            names = tuple(re.sub(r"^[a-z]/", "", folders[index]) for index in range(len(folders)))
        strange = [(name, index) for name, index in part if index >= len(names)]
        if strange:
            raise DataError(
                f"{shown} gives {strange[0][0]} the class {strange[0][1]}, but the train list has the classes 0 to "
                f"{len(names) - 1}: take both of one release"
            )
    return entries, names


def _match(
    storage: Storage, root: str, file: StoredFile, entries: Entries, images: dict[str, StoredFile]
) -> list[ImageFile]:
    """The files of the images that a list names.

    The list's paths are relative to a folder that is found by searching for one of them.
    """
    bases: list[str] = []
    for name, _ in entries[:: len(entries) // 8 + 1]:
        bases = [path.removesuffix(name) for path in images if f"/{path}".endswith(f"/{name}")]
        if bases:
            break
    if len(bases) > 1:
        raise DataError(
            f"{file.relative} fits the images in {bases[0] or '.'} and in {bases[1] or '.'}: keep one of them in "
            f"{storage.shown(root)}"
        )
    base = bases[0] if bases else ""
    missing = [name for name, _ in entries if base + name not in images]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(entries)} images of {file.relative} are not in {storage.shown(root)}, such as "
            f"{missing[0]}: unpack the archives of images there, whole"
        )
    return [ImageFile(images[base + name], label) for name, label in entries]
