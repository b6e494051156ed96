"""Image files in folders or in a list: which files, in which split, of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mixmae.data.chunks import Int64Array, cut_chunks
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.splits import SPLIT_WORDS
from mixmae.data.sources.storage import Storage, StoredFile, is_uri, locate

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)

_USUAL_BYTES = 110_000
"""Assumed size of an image of a remote list, which is not asked for: the mean of ImageNet."""


@dataclass(frozen=True)
class ImageFile:
    """One image file with its class."""

    file: StoredFile
    label: int
    """Class index, -1 without classes."""


@dataclass(frozen=True)
class Listing:
    """Image files by split and in the order of their names."""

    splits: dict[str, list[ImageFile]]
    class_names: tuple[str, ...] | None
    """Sorted names of the classes, or None if the images have no classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FilesSource(Chunked):
    """Image files, read one by one. A file that cannot be read is a row with empty bytes, so that it is counted."""

    name: str
    digest: str
    storage: Storage
    root: str
    """Folder below which the files' names are relative."""
    relatives: Any
    """(num_rows,) Arrow strings: paths below the root, or absolute ones."""
    labels: Int64Array
    num_bytes: int
    stamp: str
    """Digest of the files' times and problems and the classes' names: changes when a file is written again in the same
    size or made readable, or a class gets another name."""
    problems: dict[int, str]
    """Rows whose file was empty or not readable when the source was opened, with the reason."""
    class_names: tuple[str, ...] | None
    exact_reads: bool = True

    @cached_property
    def chunk_sizes(self) -> Int64Array:  # type: ignore[override]
        return cut_chunks(len(self.labels))

    @cached_property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        first = int(self.chunks.starts[chunk])
        rows = [first + int(row) for row in rows_in_chunk]
        samples = []
        for row, content in zip(rows, self.storage.read_files([self._path(row) for row in rows]), strict=True):
            where = self.where(row)
            data = b"" if isinstance(content, OSError) else content
            if isinstance(content, OSError):
                where += f" (cannot be read: {content.strerror or str(content).splitlines()[0]})"
            samples.append(Sample(data, int(self.labels[row]), where, path=self.relatives[row].as_py()))
        return samples

    def read_labels(self) -> Int64Array:
        return self.labels

    def where(self, row: int) -> str:
        return self.storage.shown(self._path(row))

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self.relatives[row].as_py())


def arrange(files: Sequence[StoredFile]) -> Listing:
    """Find the splits and the classes of image files by the folders that they are in.

    Splits: a `train` folder makes its neighbours `val` and `test` splits (see SPLIT_WORDS); otherwise all is "train".
    Classes: if every image lies exactly one folder deep (root/CLASS/x.jpg, root/train/CLASS/x.jpg) and there are at
    least two such folders, these are the classes, in the order of their names as torchvision's ImageFolder numbers
    them; otherwise the images have no class.
    """
    by_split: dict[str, list[StoredFile]] = {"train": list(files)}
    prefixes = {"train": ""}
    folders = {file.relative.split("/", 1)[0] for file in files if "/" in file.relative}
    named = {split: next((n for n in names if n in folders), None) for split, names in SPLIT_WORDS.items()}
    if named["train"] is not None:
        prefixes = {split: f"{name}/" for split, name in named.items() if name is not None}
        by_split = {
            split: [file for file in files if file.relative.startswith(prefix)] for split, prefix in prefixes.items()
        }

    def below(split: str, file: StoredFile) -> str:
        return file.relative.removeprefix(prefixes[split])

    class_names = _class_folders([below(split, file) for split, part in by_split.items() for file in part])
    index = {name: number for number, name in enumerate(class_names or ())}
    splits = {
        split: [ImageFile(file, index[below(split, file).split("/", 1)[0]] if index else -1) for file in part]
        for split, part in by_split.items()
    }
    return Listing(splits, class_names)


def open_files(
    storage: Storage, root: str, name: str, files: Sequence[ImageFile], class_names: tuple[str, ...] | None
) -> FilesSource:
    """Image files as a source.   Raises: DataError if none of them can be read."""
    problems = {row: image.file.problem for row, image in enumerate(files) if image.file.problem}
    if len(problems) == len(files):
        example = f"{files[0].file.relative} ({files[0].file.problem})"
        raise DataError(
            f"no image in {storage.shown(root)}: {len(files)} are empty or unreadable, such as {example}; "
            f"copy them again, or correct their permissions"
        )
    facts = [f"{image.file.relative} {image.file.num_bytes} {image.label}" for image in files]
    return FilesSource(
        name=name,
        digest=short_digest("\n".join(facts)),
        storage=storage,
        root=root,
        relatives=pa.array([image.file.relative for image in files], type=pa.large_string()),
        labels=np.array([image.label for image in files], dtype=np.int64),
        num_bytes=sum(image.file.num_bytes for image in files) or _USUAL_BYTES * len(files),
        stamp=short_digest(
            " ".join(f"{image.file.modified_ns}{image.file.problem}" for image in files) + repr(class_names)
        ),
        problems=problems,
        class_names=class_names,
    )


def read_file_list(storage: Storage, path: str) -> tuple[Storage, str, Listing]:
    """The images that a text file names: one path per line, optionally a tab and a class (a number or a name).

    Paths are absolute or relative to the list's folder; if they are URIs, all are in one store. If every class is a
    whole number these are the indices; otherwise the sorted names are numbered. Empty lines and lines that start
    with # are skipped.

    Returns: storage and root of the files, and the files.   Raises: DataError that names the line.
    """
    shown = storage.shown(path)
    try:
        lines = storage.read_file(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file list {shown} cannot be read ({error}): it must be text in UTF-8") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, tab, label = line.partition("\t")
            entries.append((number, name.strip(), label.strip() if tab else ""))
    if not entries:
        raise DataError(f"the file list {shown} names no file: write one path per line")
    root = os.path.dirname(path)
    if is_uri(entries[0][1]):
        scheme, _, rest = entries[0][1].partition("://")
        storage, root = locate(f"{scheme}://{rest.split('/', 1)[0]}")
        strangers = [number for number, name, _ in entries if not name.startswith(f"{scheme}://")]
        if strangers:
            raise DataError(f"line {strangers[0]} of {shown} lies in another store than line 1: make a list for each")
        entries = [(number, name.partition("://")[2], label) for number, name, label in entries]
        files = [StoredFile(name, name.removeprefix(f"{root}/"), 0, 0) for _, name, _ in entries]
    elif not storage.is_local:
        # A request for every file would take hours: missing files are found, and counted, when they are read.
        files = [StoredFile(f"{root}/{name}", name, 0, 0) for _, name, _ in entries]
    else:
        files = [storage.file(os.path.join(root, name), name) for _, name, _ in entries]
        missing = [index for index, file in enumerate(files) if file.problem.startswith("No such file")]
        if missing:
            number, name, _ = entries[missing[0]]
            raise DataError(
                f"{len(missing)} of the {len(files)} files in {shown} do not exist, such as {name} in line {number}: "
                f"correct the list (a relative path starts at the list's folder; the class comes after a tab)"
            )
    labels = [label for _, _, label in entries]
    class_names = None
    if all(label.lstrip("-").isdecimal() for label in labels if label):
        indices = [int(label) if label else -1 for label in labels]
    else:
        class_names = tuple(sorted({label for label in labels if label}))
        known = {name: number for number, name in enumerate(class_names)}
        indices = [known.get(label, -1) for label in labels]
    images = [ImageFile(file, label) for file, label in zip(files, indices, strict=True)]
    return storage, root, Listing({"": images}, class_names)


def _class_folders(relatives: list[str]) -> tuple[str, ...] | None:
    parts = [relative.split("/") for relative in relatives]
    names = sorted({part[0] for part in parts})
    return tuple(names) if all(len(part) == 2 for part in parts) and len(names) > 1 else None
