"""Image files in folders or in a list: which files, in which split, of which class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mixmae.data.account import Met, Note, Tally, escaped
from mixmae.data.chunks import Int64Array, cut_chunks
from mixmae.data.images.decode import READS_HEIC
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.contents import content_digests
from mixmae.data.sources.labels import number_classes
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile, locate
from mixmae.stores import is_uri

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
    + ((".heic", ".heif") if READS_HEIC else ())
)

_FEW = 10
"""Images that lie elsewhere than the others, in folders named after classes, are strays if they are one in ten or
less."""

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
    notes: tuple[Note, ...] = ()
    """Images that are left out, or have no class though others have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FilesSource(Chunked):
    """Image files, read one by one. A file that cannot be read is a row with empty bytes, so that it is counted."""

    name: str
    storage: Storage
    root: str
    """Folder below which the files' names are relative."""
    relatives: Any
    """(num_rows,) Arrow binaries: paths below the root, or absolute ones, as the system stores them."""
    stamps: Int64Array
    """(num_rows, 4) StoredFile.stamp of every file when the source was opened."""
    labels: Int64Array
    num_bytes: int
    problems: dict[int, str]
    """Rows whose file was empty or not readable when the source was opened, with the reason."""
    class_names: tuple[str, ...] | None
    met: tuple[Met, ...]
    exact_reads: bool = True

    @cached_property
    def chunk_sizes(self) -> Int64Array:  # type: ignore[override]
        return cut_chunks(len(self.labels))

    @cached_property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    @property
    def digest(self) -> str:
        return self._contents[0]

    @cached_property
    def _contents(self) -> tuple[str, list[str]]:
        """The digest of all, and the first part of each file's."""
        digests = self._digests()
        names = [self._relative(row) for row in range(self.num_rows)]
        facts = [f"{name} {digest} {label}" for name, digest, label in zip(names, digests, self.labels, strict=True)]
        return short_digest("\n".join([*facts, repr(self.class_names)])), digests

    def _digests(self) -> list[str]:
        stamps = self.stamps.tolist()
        if not self.storage.is_local:  # asking for every file would take hours
            return [f"{size} {modified}" for size, modified, _, _ in stamps]
        files = [
            StoredFile(self._path(row), "", size, modified, "", changed, inode)
            for row, (size, modified, changed, inode) in enumerate(stamps)
        ]
        return content_digests(self.storage, self.root, files)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        first = int(self.chunks.starts[chunk])
        rows = [first + int(row) for row in rows_in_chunk]
        samples = []
        for row, content in zip(rows, self.storage.read_files([self._path(row) for row in rows]), strict=True):
            problem = self._problem(row, content)
            data = b"" if problem or isinstance(content, OSError) else content
            label, path = int(self.labels[row]), escaped(self._relative(row))
            samples.append(Sample(data, label, self.where(row), path=path, problem=problem))
        return samples

    def _problem(self, row: int, content: bytes | OSError) -> str:
        """Why a file cannot be used, or "" if it is the one that was opened."""
        if isinstance(content, OSError):
            return f"the file cannot be read: {content.strerror or str(content).splitlines()[0]}"
        size, modified, _, _ = self.stamps[row].tolist()
        now = self.storage.identity(self._path(row))[:2] if self.storage.is_local else (len(content), modified)
        known = (size, modified) != (0, 0)  # a list in a store has only names
        if known and now != (size, modified) and not self._was(row, content):
            return "the file has changed since it was opened"
        return ""

    def _was(self, row: int, content: bytes) -> bool:
        """Whether this is what the file contained when the digest was computed; unknown if it was not."""
        known: tuple[str, list[str]] | None = self.__dict__.get("_contents")
        return known is not None and hashlib.sha256(content).hexdigest() == known[1][row]

    def read_labels(self) -> Int64Array:
        return self.labels

    def where(self, row: int) -> str:
        return self.storage.shown(self._path(row))

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self._relative(row))

    def _relative(self, row: int) -> str:
        return bytes(self.relatives[row].as_py()).decode(errors="surrogateescape")


def arrange(files: Sequence[StoredFile]) -> Listing:
    """Find the splits and the classes of image files by the folders that they are in.

    A folder that contains all others is passed over. Splits: folders with the names of splits (splits.SPLIT_WORDS), if
    these are not rather classes (_split_folders); otherwise all is "train". Classes: if all images lie one folder
    deep (root/CLASS/x.jpg, root/train/CLASS/x.jpg; or in a folder of the same name in each class, as Tiny-ImageNet has
    it: CLASS/images/x.jpg), these folders are the classes, in the order of their names as torchvision's ImageFolder
    numbers them. Up to one image in ten may lie elsewhere: deeper inside a class it has that class, otherwise none.
    """
    tally = Tally()
    skip = len(_wrapper(files))
    splits = _split_folders([file.relative[skip:] for file in files])
    by_split: dict[str, list[tuple[StoredFile, str]]] = {}  # with the path inside the split
    for file in files:
        folder, slash, inner = file.relative[skip:].partition("/")
        if not splits:
            by_split.setdefault("train", []).append((file, file.relative[skip:]))
        elif slash and folder in splits:
            by_split.setdefault(splits[folder], []).append((file, inner))
        else:
            names = ", ".join(sorted(splits))
            what = f"in the folder {escaped(folder)}/" if slash else "beside the folders of the splits"
            remedy = f"move them into {names}, or give them as a source of their own"
            tally.add(f"images {what} are left out", file.relative, remedy)
    classes = {split: _classes([inner for _, inner in part]) for split, part in by_split.items()}
    trained = set(filter(None, classes.get("train", ())))
    for split, own in classes.items():
        if len(trained) > 1 and len(set(own)) == 1 and not trained & set(own):  # val/images/x.jpg: no class
            classes[split] = [""] * len(own)
    known = sorted({name for own in classes.values() for name in own if name})
    index = {"": -1, **{name: number for number, name in enumerate(known)}}
    for split, part in by_split.items():
        own = classes[split]
        if any(own):
            depth = Counter(inner.count("/") for _, inner in part).most_common(1)[0][0]
            for (file, inner), name in zip(part, own, strict=True):
                if not name:
                    tally.add("images outside the folders of the classes have no class", file.relative, _STRAY)
                elif inner.count("/") != depth:
                    tally.add("images deeper inside a class's folder than others have its class", file.relative)
        elif known:
            tally.add(unsorted(split), part[0][0].relative, _UNSORTED, len(part))
    return Listing(
        {
            split: [ImageFile(file, index[name]) for (file, _), name in zip(part, classes[split], strict=True)]
            for split, part in by_split.items()
        },
        tuple(map(escaped, known)) or None,
        tally.notes,
    )


def unsorted(split: str) -> str:
    """What the note says of a split without classes beside others that have some."""
    return f"images of the split {split} have no class"


_STRAY = "move them into one"
_UNSORTED = "sort them into folders named after the classes"


def _wrapper(files: Sequence[StoredFile]) -> str:
    """The folders, with a slash at the end, in which all images and all other folders of images lie."""
    prefix = ""
    while True:
        inner = [file.relative[len(prefix) :] for file in files]
        first = inner[0].partition("/")[0]
        alone = all(name.startswith(f"{first}/") and name.count("/") > 1 for name in inner)
        if not alone or split_of_folder(first):
            return prefix
        prefix += f"{first}/"


def _split_folders(names: Sequence[str]) -> dict[str, str]:
    """The outermost folders that are splits, with their split; empty if there are none.

    A class may be called train or test: beside folders with other names, those of splits count if `train` has folders
    inside, or if they are more than the others.
    """
    images = Counter(name.partition("/")[0] for name in names if "/" in name)
    nested = Counter(name.partition("/")[0] for name in names if name.count("/") > 1)
    splits = {folder: split for folder in images if (split := split_of_folder(folder)) is not None}
    others = len(images) - len(splits)
    training = [folder for folder, split in splits.items() if split == "train"]
    if not others or (training and any(2 * nested[folder] > images[folder] for folder in training)):
        return splits
    return splits if training and len(splits) > others else {}


def _classes(names: Sequence[str]) -> list[str]:
    """The class of every image of a split, "" where it has none.   Args: names: paths inside the split."""
    parts = [name.split("/") for name in names]
    none = [""] * len(parts)
    inside = Counter(tuple(part[1:-1]) for part in parts if len(part) > 1)  # from the class's folder to its images
    if not inside:
        return none
    between, count = inside.most_common(1)[0]
    sorted_in = {part[0] for part in parts if len(part) > 1 and part[1:-1] == list(between)}
    if count * _FEW < len(parts) * (_FEW - 1) or (between and len(sorted_in) == 1):
        return none
    return [part[0] if len(part) > 1 and part[0] in sorted_in else "" for part in parts]


def open_files(
    storage: Storage,
    root: str,
    name: str,
    files: Sequence[ImageFile],
    class_names: tuple[str, ...] | None,
    met: Sequence[Met] = (),
) -> FilesSource:
    """Image files as a source.   Raises: DataError if none of them can be read."""
    problems = {row: image.file.problem for row, image in enumerate(files) if image.file.problem}
    if len(problems) == len(files):
        example = f"{escaped(files[0].file.relative)} ({files[0].file.problem})"
        raise DataError(
            f"no image in {storage.shown(root)}: {len(files)} are empty or unreadable, such as {example}; "
            f"copy them again, or correct their permissions"
        )
    names = [image.file.relative.encode(errors="surrogateescape") for image in files]
    return FilesSource(
        name=name,
        storage=storage,
        root=root,
        relatives=pa.array(names, type=pa.large_binary()),
        stamps=np.array([image.file.stamp for image in files], dtype=np.int64),
        labels=np.array([image.label for image in files], dtype=np.int64),
        num_bytes=sum(image.file.num_bytes for image in files) or _USUAL_BYTES * len(files),
        problems=problems,
        class_names=class_names,
        met=(Met(f"{storage.shown(root)} {name}", {"image files": len(files)}), *met),
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
        lines = _text(storage.read_file(path)).split("\n")  # names may contain other ends of lines
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
    index, class_names = number_classes(labels)
    images = [ImageFile(file, index.get(label, -1)) for file, label in zip(files, labels, strict=True)]
    return storage, root, Listing({"": images}, class_names)


def _text(content: bytes) -> str:
    """The text of a list: UTF-8, or UTF-16 as Windows writes it; in names, any bytes.   Raises: UnicodeDecodeError."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in content:
        return content.decode("utf-16")
    if b"\0" in content:
        raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), content.index(b"\0") + 1, "not text")
    return content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
