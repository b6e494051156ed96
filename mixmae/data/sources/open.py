"""Opening a collection of images, whatever its layout (docs/data.md lists them).

Opening checks the collection, so that a missing or damaged file is an error before a run starts.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mixmae.data.account import Met, Note, Tally, escaped
from mixmae.data.source import DataError, Source
from mixmae.data.sources.annotations import ANNOTATION_SUFFIXES, is_annotation, label_validation, read_annotated
from mixmae.data.sources.folders import IMAGE_SUFFIXES, Listing, arrange, open_files, read_file_list
from mixmae.data.sources.joined import join
from mixmae.data.sources.masks import MaskListing, list_masks, open_masked
from mixmae.data.sources.objects import ObjectListing, list_objects, open_objects
from mixmae.data.sources.parquet import open_parquet
from mixmae.data.sources.shard_index import INDEX_SUFFIX, index_path
from mixmae.data.sources.splits import SPLITS, num_stored_images, split_holdout, split_of
from mixmae.data.sources.storage import Storage, StoredFile, locate, suffix_of
from mixmae.data.sources.tars import open_tars
from mixmae.stores import is_uri

Location = str | Path | Sequence[str | Path | tuple[str | Path, float]]
"""What open_source takes: a path, a glob or a URI, or a list of these, each alone or as (path, weight)."""
Layout = Literal["parquet", "tar", "files", "list"]

MANIFEST_NAME = "manifest.json"
_LIST_SUFFIXES = (".txt", ".tsv", ".lst", ".list")
_CALLED = {"parquet": "Parquet files", "tar": "tars", "files": "image files"}
OBJECT_SUFFIXES = (".xml", ".yaml", ".yml")
"""Of files that describe the objects of images, beside those of ANNOTATION_SUFFIXES."""
_CLASS_NAME_FILES = ("classnames.txt", "classes.txt")
_LAYOUTS: dict[str, Layout] = {
    ".parquet": "parquet",
    ".tar": "tar",
    **dict.fromkeys(IMAGE_SUFFIXES, "files"),
    **dict.fromkeys(_LIST_SUFFIXES, "list"),
}


def open_source(location: Location, split: str = "train") -> Source:
    """Open a collection of images and check that it is whole.

    Args:
        location: a folder of Parquet files, of tars or of images, searched through its subfolders, or of images with
            annotation files (annotations.py); a Parquet file, tar or file list; a glob of any of these; a URI of one in
            a store that pyarrow knows (s3://, gs://); a list of these, each alone or as (location, weight), or a JSON
            file with such a list. joined.py explains weights; they apply to the split "train" only. Classes have the
            same indices in all splits.
        split: train, validation or test, given by annotations or by the names of files and folders; files without
            such a name are "train".
    Raises: DataError if nothing is there, a file is damaged, or no column holds images.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split called {split!r}: choose one of {', '.join(SPLITS)}")
    finds = [(_find(single), weight) for single, weight in _terms(location)]
    there = [(found, weight) for found, weight in finds if split in found.splits]
    if not there or (split == "train" and len(there) < len(finds)):
        found = next(found for found, _ in finds if split not in found.splits)
        names = ", ".join(sorted(found.splits))
        raise DataError(
            f"{found.title} has no {split} split, only {names}: name one of these, or hold out rows of another"
        )
    weights = [weight if split == "train" else 1.0 for _, weight in there]
    like = None
    if split != "train" and len(finds) > 1:  # perhaps only some of them have this split: number classes as in training
        trained = [_open(found, "train") for found, _ in finds if "train" in found.splits]
        like = join(trained, [1.0] * len(trained)) if trained else None
    return join([_open(found, split) for found, _ in there], weights, like)


def list_splits(location: Location) -> tuple[str, ...]:
    """The splits of a collection, in the order of SPLITS.   Raises: DataError if nothing is there."""
    there = {split for single, _ in _terms(location) for split in _find(single).splits}
    return tuple(split for split in SPLITS if split in there)


def layout_of(location: Location) -> Layout | Literal["several"]:
    """How a collection is stored.   Raises: DataError if nothing is there."""
    layouts = {_find(single).layout for single, _ in _terms(location)}
    return layouts.pop() if len(layouts) == 1 else "several"


def open_train_and_held_out(location: Location, holdout_rows: int = 1000) -> tuple[Source, Source]:
    """The training split, and the validation split or, where there is none, the training set's last rows.

    Args: holdout_rows: at most this many are cut off, and never more than a tenth of the set.
    Raises: DataError as open_source does.
    """
    train = open_source(location, "train")
    if "validation" in list_splits(location):
        return train, open_source(location, "validation")
    return split_holdout(train, max(1, min(holdout_rows, num_stored_images(train) // 10)))


@dataclass(frozen=True)
class _Collection:
    """What lies at one path, glob or URI."""

    layout: Layout
    storage: Storage
    root: str
    """Folder below which names are relative."""
    label: str
    """The last part of its path."""
    splits: dict[str, list[StoredFile]]
    listing: Listing = field(default_factory=lambda: Listing({}, None))
    """Of images, with their classes."""
    beside: frozenset[str] = frozenset()
    """Paths of files that describe others: sidecars of shards, names of classes."""
    notes: tuple[Note, ...] = ()
    """Of what is left out."""
    masks: MaskListing | None = None
    """The masks of the images, where they have some."""
    objects: ObjectListing | None = None
    """The objects of the images, where they are known."""

    @property
    def title(self) -> str:
        return self.storage.shown(self.root)

    @property
    def met(self) -> tuple[Met, ...]:
        known = (*(self.masks.notes if self.masks else ()), *(self.objects.notes if self.objects else ()))
        notes = (*self.notes, *self.listing.notes, *known)
        return (Met(self.title, {}, notes),) if notes else ()


def _terms(location: Location) -> list[tuple[str, float]]:
    """Single locations with their weights."""
    if isinstance(location, (str, Path)):
        text = str(location)
        if suffix_of(text) == ".json" and not is_uri(text):
            return _read_mixture(Path(text).expanduser())
        return [(text, 1.0)]
    terms: list[tuple[str, float]] = []
    for entry in location:
        single, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        terms += [(term, inner * float(weight)) for term, inner in _terms(single)]
    if not terms:
        raise DataError("the list of data sources is empty: name at least one folder, file or URI")
    return terms


def _read_mixture(path: Path) -> list[tuple[str, float]]:
    wanted = 'a list such as ["photos", {"source": "s3://bucket/shards", "weight": 2}]'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise TypeError
        terms: list[Any] = []
        for entry in entries:
            single, weight = (
                (entry, 1.0) if isinstance(entry, str) else (entry["source"], float(entry.get("weight", 1)))
            )
            local = not is_uri(single) and not single.startswith("~")
            terms.append((str(path.absolute().parent / single) if local else single, weight))
    except OSError as error:
        raise DataError(f"the list of sources {path} cannot be read ({error.strerror}): check the spelling") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of sources: it must be JSON, {wanted} (annotations are read from their folder)"
        ) from error
    return _terms(terms)


def _find(text: str) -> _Collection:
    """What lies at a path, glob or URI.   Raises: DataError if it is no known layout."""
    wild = any(sign in text for sign in ("*[{" if is_uri(text) else "*?[{"))  # a URI's ? begins its query
    if wild and (is_uri(text) or not os.path.exists(os.path.expanduser(text))):
        return _find_glob(text)
    storage, path = locate(text)
    kind = storage.kind(path)
    shown = storage.shown(path)
    if not kind:
        remedy = "or make shards there with make_shards" if storage.is_local else "the credentials and the endpoint"
        raise DataError(f"the data path {shown} does not exist: check the spelling, {remedy}")
    if storage.is_local:
        path = os.path.realpath(path)
    if kind == "file":
        file = storage.file(path)
        layout = _LAYOUTS.get(suffix_of(path))
        if is_annotation(path):
            raise DataError(f"{shown} has the classes of the images beside it: give the folder that contains both")
        if layout is None or layout == "files":
            raise DataError(
                f"{shown} is a single file that is not Parquet, a tar or a list of files (.txt): give one of these, or "
                f"a folder of images or of shards"
            )
        beside = [index_path(path)] if layout == "parquet" else []
        return _found(layout, storage, os.path.dirname(path), [file], beside, os.path.basename(path))
    voc_masks = os.path.basename(path) == "SegmentationObject" and os.path.isdir(f"{os.path.dirname(path)}/Annotations")
    only_objects = storage.is_local and (voc_masks or os.path.basename(path) == "Annotations")
    if only_objects:  # of Pascal VOC, which has masks, too
        path = os.path.dirname(path)
    beside_names = {INDEX_SUFFIX, *ANNOTATION_SUFFIXES, *OBJECT_SUFFIXES}
    listed, notes = storage.list_files(path, {".parquet", ".tar", *IMAGE_SUFFIXES, *beside_names})
    sidecars = (INDEX_SUFFIX, *_CLASS_NAME_FILES)
    beside = [file.path for file in listed if file.path.endswith(sidecars)]
    by_layout: dict[str, list[StoredFile]] = {}
    for file in listed:
        if suffix_of(file.path) not in beside_names:
            by_layout.setdefault(_LAYOUTS[suffix_of(file.path)], []).append(file)
    masks = None if only_objects else list_masks(storage, path, by_layout.get("files", ()))
    if masks is not None:
        images = {split: [pair.image for pair in pairs] for split, pairs in masks.splits.items()}
        return _Collection("files", storage, path, os.path.basename(path), images, notes=notes, masks=masks)
    lists = [file for file in listed if suffix_of(file.path) in ANNOTATION_SUFFIXES]
    if not any(layout in by_layout for layout in ("parquet", "tar")):
        described = [file for file in listed if suffix_of(file.path) in {*ANNOTATION_SUFFIXES, *OBJECT_SUFFIXES}]
        objects = list_objects(storage, path, described, by_layout.get("files", ()), voc_masks=voc_masks)
        if objects is not None:
            images = {split: [file for file, _ in pairs] for split, pairs in objects.splits.items()}
            return _Collection("files", storage, path, os.path.basename(path), images, notes=notes, objects=objects)
    annotated = read_annotated(storage, path, lists, by_layout.get("files", ()))
    if annotated is not None:  # tars beside them are the archives that the images came in
        return _listed(storage, path, os.path.basename(path), annotated, notes)
    for layout in ("parquet", "tar", "files"):
        if layout in by_layout:
            tally = Tally()
            for other in by_layout.keys() - {layout}:
                what = f"{_CALLED[other]} beside {_CALLED[layout]} are left out"
                tally.add(
                    what,
                    by_layout[other][0].relative,
                    "give their folder as a source of its own",
                    len(by_layout[other]),
                )
            notes += tally.notes
            found = _found(layout, storage, path, by_layout[layout], beside, os.path.basename(path), notes)
            if layout == "files":
                found = replace(found, listing=label_validation(storage, lists, found.listing))
            return found
    there = f"; it has {notes[0]}" if notes else ""
    raise DataError(
        f"no image in {shown}: it needs Parquet files, WebDataset tars, or files ending in "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}{there}"
    )


def _find_glob(text: str) -> _Collection:
    address, mark, query = text.partition("?") if is_uri(text) else (os.path.expanduser(text), "", "")
    parts = address.split("/")
    fixed = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?[{"))
    storage, root = locate("/".join(parts[:fixed]) + mark + query if fixed else ".")
    pattern = "/".join(parts[fixed:])
    patterns = _expand_braces(pattern)
    if storage.is_local:
        root = os.path.realpath(root or "/")
        names = sorted({name for one in patterns for name in glob.glob(one, root_dir=root, recursive=True)})
        matched = [storage.file(os.path.join(root, name), name) for name in names]
        folders = [file.path for file in matched if os.path.isdir(file.path)]
        matched = [file for file in matched if suffix_of(file.path) in _LAYOUTS and file.path not in set(folders)]
        if folders and not matched:
            listed = [storage.list_files(folder, _LAYOUTS)[0] for folder in folders]
            matched = [
                replace(file, relative=os.path.relpath(file.path, root))
                for files in listed
                for file in files
                if _LAYOUTS[suffix_of(file.path)] != "list"
            ]
    else:
        regex = re.compile("|".join(_glob_regex(one) for one in patterns))
        matched = [file for file in storage.list_files(root, _LAYOUTS)[0] if regex.fullmatch(file.relative)]
        folders = []
    named = {one.rstrip("/") for one in patterns if not any(sign in one for sign in "*?[")}
    lost = sorted(named - {file.relative for file in matched} - {os.path.relpath(path, root) for path in folders})
    if not matched or lost:
        pattern = lost[0] if lost else pattern
        raise DataError(
            f"nothing matches {storage.shown(root)}/{pattern}: check the spelling; it should name Parquet files, tars, "
            f"lists of files or images"
        )
    layouts = sorted({_LAYOUTS[suffix_of(file.path)] for file in matched})
    if len(layouts) > 1 or (layouts == ["list"] and len(matched) > 1):
        raise DataError(
            f"{storage.shown(root)}/{pattern} matches files of several sources ({', '.join(layouts)}): narrow it, or "
            f"give a list of sources"
        )
    # In a store each sidecar would take a request of its own; locally it takes no time.
    beside = [index_path(file.path) for file in matched if storage.is_local and os.path.exists(index_path(file.path))]
    return _found(layouts[0], storage, root, matched, beside, os.path.basename(root))


def _found(
    layout: str,
    storage: Storage,
    root: str,
    files: list[StoredFile],
    beside: Sequence[str],
    label: str,
    notes: tuple[Note, ...] = (),
) -> _Collection:
    if layout == "files":
        return _listed(storage, root, label, arrange(files), notes)
    splits: dict[str, list[StoredFile]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative) or "", []).append(file)
    unnamed = splits.pop("", [])
    if unnamed:
        splits.setdefault("train", []).extend(unnamed)
    kind: Layout = "parquet" if layout == "parquet" else "tar" if layout == "tar" else "list"
    return _Collection(kind, storage, root, label, splits, beside=frozenset(beside), notes=notes)


def _listed(storage: Storage, root: str, label: str, listing: Listing, notes: tuple[Note, ...] = ()) -> _Collection:
    splits = {split: [image.file for image in images] for split, images in listing.splits.items()}
    return _Collection("files", storage, root, label, splits, listing, notes=notes)


def _open(found: _Collection, split: str) -> Source:
    storage, files, met = found.storage, found.splits[split], found.met
    others = [file for other, part in found.splits.items() if other != split for file in part]
    name = f"{escaped(found.label)}/{split}"
    if found.layout == "parquet":
        manifest = _manifest(found)
        return open_parquet(
            storage, name, files, found.beside, root=found.root, manifest=manifest, others=others, met=met
        )
    if found.layout == "tar":
        return open_tars(storage, name, files, _tar_class_names(found), others=others, met=met)
    if found.layout == "list":
        storage, root, listing = read_file_list(storage, files[0].path)
        return open_files(storage, root, name, listing.splits[""], listing.class_names)
    if found.masks is not None:
        return open_masked(storage, found.root, name, split, found.masks, met)
    if found.objects is not None:
        return open_objects(storage, found.root, name, split, found.objects, met)
    return open_files(storage, found.root, name, found.listing.splits[split], found.listing.class_names, met)


def _manifest(found: _Collection) -> dict[str, Any]:
    """The manifest of a folder of our shards, with the time when it was written; empty for others."""
    path = f"{found.root}/{MANIFEST_NAME}"
    try:
        content = json.loads(found.storage.read_file(path))
    except (OSError, ValueError):
        return {}
    return {**content, "written_ns": found.storage.file(path).modified_ns} if isinstance(content, dict) else {}


def _tar_class_names(found: _Collection) -> tuple[str, ...] | None:
    for name in _CLASS_NAME_FILES:
        path = f"{found.root}/{name}"
        if path in found.beside:
            lines = found.storage.read_file(path).decode("utf-8-sig", "surrogateescape").splitlines()
            return tuple(escaped(line.strip()) for line in lines if line.strip())
    return None


def _expand_braces(text: str) -> list[str]:
    """name-{0..3}.tar and {a,b}/c as lists of names, as a shell does."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    steps = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if steps:
        width = len(steps.group(1))
        choices = [f"{number:0{width}d}" for number in range(int(steps.group(1)), int(steps.group(2)) + 1)]
    else:
        choices = match.group(1).split(",")
    return [name for choice in choices for name in _expand_braces(text[: match.start()] + choice + text[match.end() :])]


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression over relative paths: ** is any number of folders, * stays inside one."""
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts.append(r"(?:[^/]+/)*")
        else:
            inner = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
            parts.append(inner.replace(".*", "[^/]*") + "/")
    return "".join(parts).removesuffix("/")
