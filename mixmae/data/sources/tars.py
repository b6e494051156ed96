"""WebDataset tars: KEY.jpg (or png, webp, ...), KEY.cls with the class, KEY.json with whatever else is known.

The headers are read once; from then on every image is read at its offset. The index is kept as an Arrow file beside
the tar, or in the user's cache if that folder cannot be written or the tar is remote, and is made again when the tar
changes.

The members of a sample may lie anywhere in the tar. Every image is a sample of its own, except further images of a
sample as WebDataset has them: 0001.jpg and 0001.mask.png. So names may contain dots.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mixmae.data.account import Met, Note, Tally, escaped, merge_notes
from mixmae.data.chunks import Int64Array, cut_chunks
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.contents import changed, content_digests
from mixmae.data.sources.folders import IMAGE_SUFFIXES
from mixmae.data.sources.labels import number_classes
from mixmae.data.sources.shard_index import read_arrow, write_arrow
from mixmae.data.sources.storage import INDEX_SUFFIX, Storage, StoredFile, is_hidden, suffix_of, unknown_kind
from mixmae.machine import cache_folders

_INDEX_FORMAT = b"2"
_LABEL_KEYS = ("label", "cls", "class_id", "class_index", "class", "class_name", "category")
"""Where a .json may have the class, the best first."""
_SMALL_BYTES = 64 * 1024
"""A larger .cls or .json member is not the label of an image."""
_LONGEST_NAME = 200
"""A longer text is no class."""
_READ_AHEAD_BYTES = 1024 * 1024
"""Remote tars are read through for their headers: to skip each image would take a request per image."""
_FIELD = re.compile(r"[a-z_][a-z0-9_]*", re.IGNORECASE)
"""A part of a name that may be the name of a field of a sample, as in 0001.mask.png; dates and numbers are not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource(Chunked):
    """The images of tar files, in the order of the files and of their members."""

    name: str
    storage: Storage
    stored: tuple[StoredFile, ...]
    """The tars as they were when the source was opened."""
    chunk_sizes: Int64Array
    chunk_files: Int64Array
    """(num_chunks,) index into `stored`: a chunk lies in one tar."""
    starts: Int64Array
    """(num_rows,) first byte of every image in its tar."""
    lengths: Int64Array
    """(num_rows,) bytes."""
    labels: Int64Array
    """(num_rows,), -1 where there is none."""
    members: Any
    """(num_rows,) Arrow strings: the images' names in their tars."""
    class_names: tuple[str, ...] | None
    met: tuple[Met, ...]
    exact_reads: bool = True

    @cached_property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    @property
    def digest(self) -> str:
        facts = [
            f"{file.relative.rpartition('/')[2]} {contents}"
            for file, contents in zip(self.stored, self._contents, strict=True)
        ]
        return short_digest("\n".join([*facts, str(self.num_rows), repr(self.class_names)]))

    @cached_property
    def _contents(self) -> list[str]:
        """The digest of every tar."""
        return content_digests(self.storage, self.name + self.stored[0].path, self.stored)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        rows = np.asarray(rows_in_chunk, dtype=np.int64) + self.chunks.starts[chunk]
        number = int(self.chunk_files[chunk])
        file = self.stored[number]
        known = self.__dict__.get("_contents")
        problem = changed(self.storage, file, known[number] if known else "")
        parts = [b""] * len(rows)
        if not problem:
            parts = self.storage.read_ranges(file.path, self.starts[rows], self.lengths[rows])
        shown = self.storage.shown(file.path)
        names = [self.members[row].as_py() for row in rows.tolist()]
        return [
            Sample(data, int(self.labels[row]), f"{shown} / {name}", path=name, problem=problem)
            for row, data, name in zip(rows, parts, names, strict=True)
        ]

    def read_labels(self) -> Int64Array:
        return self.labels

    def where(self, row: int) -> str:
        (chunk,), _ = self.chunks.locate([row])
        path = self.stored[self.chunk_files[chunk]].path
        return f"{self.storage.shown(path)} / {self.members[row].as_py()}"


def open_tars(
    storage: Storage,
    name: str,
    files: Sequence[StoredFile],
    class_names: tuple[str, ...] | None = None,
    others: Sequence[StoredFile] = (),
    met: Sequence[Met] = (),
) -> TarSource:
    """Open tar files: read their indexes, or their headers where there is none yet.

    Args:   class_names: if a file beside the tars has them.  others: tars of other splits, whose classes have numbers
            of the same range.  met: of the collection.
    Raises: DataError if a tar is damaged, compressed or holds no image.
    """
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda file: _index(storage, file), [*files, *others]))
    texts = pa.concat_tables(tables).column("label").unique().drop_null().to_pylist()
    index, class_names = number_classes(texts, class_names)
    tables = tables[: len(files)]
    sizes = [cut_chunks(table.num_rows) for table in tables]
    whole = pa.concat_tables(tables).combine_chunks()
    written = whole.column("label").to_pylist()
    labels = np.array([index.get(text.strip(), -1) if text else -1 for text in written], dtype=np.int64)
    tally = Tally()
    if not {text.strip() for text in texts} <= index.keys():
        for text, member in zip(written, whole.column("member").to_pylist(), strict=True):
            if text and text.strip() not in index:
                tally.add("images have an unknown class", f"{member} ({text.strip()[:40]!r})", _KNOW_CLASSES)
    counted = [json.loads(table.schema.metadata[b"met"]) for table in tables]
    notes = merge_notes([*(Note(**note) for found in counted for note in found["notes"]), *tally.notes])
    place = f"{storage.shown(files[0].path.rpartition('/')[0])} {name}"
    counts = {"tars": len(files), "members of tars": sum(found["members"] for found in counted)}
    return TarSource(
        name=name,
        storage=storage,
        stored=tuple(files),
        chunk_sizes=np.concatenate(sizes),
        chunk_files=np.repeat(np.arange(len(files)), [len(part) for part in sizes]),
        starts=whole.column("start").to_numpy(),
        lengths=whole.column("length").to_numpy(),
        labels=labels,
        members=whole.column("member").combine_chunks(),
        class_names=class_names,
        met=(Met(place, counts, notes), *met),
    )


_KNOW_CLASSES = "add it to classnames.txt, or correct it"


def _index(storage: Storage, file: StoredFile) -> pa.Table:
    """Start, length, label and name of every image of a tar, from the kept index if the tar has not changed."""
    stamp = {b"format": _INDEX_FORMAT, b"tar": " ".join(map(str, file.stamp)).encode()}
    for path in _index_paths(storage, file.path):
        with contextlib.suppress(OSError, pa.ArrowException, DataError):
            kept = read_arrow(Storage(), str(path))
            if stamp.items() <= (kept.schema.metadata or {}).items():
                return kept
    found = _read_headers(storage, file)
    images = found.images()
    table = pa.table(
        {
            "start": pa.array([image.start for image in images], type=pa.int64()),
            "length": pa.array([image.length for image in images], type=pa.int64()),
            "label": pa.array([found.label_of(image) for image in images], type=pa.large_string()),
            "member": pa.array([escaped(image.name) for image in images], type=pa.large_string()),
        },
        metadata={**stamp, b"met": json.dumps(found.met()).encode()},
    )
    for path in _index_paths(storage, file.path):
        with contextlib.suppress(OSError):
            write_arrow(path, table)
            break
    return table


def _index_paths(storage: Storage, path: str) -> Iterator[Path]:
    """The paths where a tar's index may be kept, the best first."""
    if storage.is_local:
        tar = Path(path)
        yield tar.with_name(f".{tar.name}{INDEX_SUFFIX}")
    name = hashlib.sha256(storage.shown(path).encode()).hexdigest()[:32]
    yield from (folder / "tars" / f"{name}{INDEX_SUFFIX}" for folder in cache_folders())


@dataclass(frozen=True)
class _Member:
    """An image in a tar."""

    name: str
    start: int
    length: int

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def key(self) -> str:
        """WebDataset's key of the sample: the name up to the first dot of its last part."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.rpartition(".")[0]

    @property
    def fields(self) -> list[str]:
        """What lies between key and suffix: ["mask"] of 0001.mask.png."""
        return self.base.split(".")[1:-1]


@dataclass
class _Members:
    """What one tar holds."""

    by_name: dict[str, _Member] = field(default_factory=dict)
    """Images; of two members of one name the later one, which is what unpacking would leave."""
    labels: dict[str, str] = field(default_factory=dict)
    """Text of .cls members, by their name without the suffix."""
    facts: dict[str, str] = field(default_factory=dict)
    """Class in .json members, likewise."""
    num_members: int = 0
    tally: Tally = field(default_factory=Tally)
    _used: set[str] = field(default_factory=set)

    def images(self) -> list[_Member]:
        """The images that are samples, in the order of the tar."""
        images = list(self.by_name.values())
        shared = Counter(tuple(image.fields) for image in images)
        plain = {image.key: image for image in reversed(images) if not image.fields}
        first: dict[str, _Member] = {}  # of the images of one sample
        chosen = []
        for image in images:
            are_fields = all(map(_FIELD.fullmatch, image.fields))
            if not are_fields or (image.key not in plain and shared[tuple(image.fields)] == 1):
                chosen.append(image)  # the dots are part of its name
            elif image is plain.get(image.key, first.setdefault(image.key, image)):
                chosen.append(image)
            else:
                self.tally.add("further images of a sample are left out", image.name, "give each a name of its own")
        return chosen

    def label_of(self, image: _Member) -> str | None:
        """The class of an image as it is written."""
        for place in (self.labels, self.facts):
            for name in (image.stem, image.key):
                if name in place:
                    self._used.add(name)
                    return place[name]
        return None

    def met(self) -> dict[str, Any]:
        """What to say about the tar, once its images have their labels."""
        for name in self.labels:
            if name not in self._used:
                self.tally.add("labels are left out, because their images are missing", f"{name}.cls")
        return {"members": self.num_members, "notes": [asdict(note) for note in self.tally.notes]}


def _read_headers(storage: Storage, file: StoredFile) -> _Members:
    shown = storage.shown(file.path)
    if file.problem:
        raise DataError(f"{shown} cannot be used ({file.problem}): copy or download it again, or delete it")
    found = _Members()
    try:
        with _stream(storage, file.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise the headers of a large tar pile up
                if not member.isdir():
                    found.num_members += 1
                    _add(found, tar, member, file.num_bytes)
    except Exception as error:  # tarfile raises whatever it likes on damaged bytes
        remedy = "copy or download it again, or delete it"
        with _stream(storage, file.path) as stream:
            if stream.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                remedy = "it is compressed: unpack the compression (gunzip), so that images can be read in any order"
        raise DataError(f"{shown} is not a whole tar file ({escaped(str(error))}): {remedy}") from error
    if not found.by_name:
        there = f"; it holds {found.tally.notes[0]}" if found.tally.notes else ""
        raise DataError(f"{shown} holds no image: its members need names like KEY.jpg, KEY.png or KEY.webp{there}")
    return found


def _add(found: _Members, tar: tarfile.TarFile, member: tarfile.TarInfo, num_bytes: int) -> None:
    """Take one member of a tar into account.   Raises: tarfile.ReadError if it reaches beyond the tar's end."""
    name, suffix = member.name, suffix_of(member.name)
    if is_hidden(name):
        found.tally.add("hidden members of tars are left out", name)
        return
    if not member.isreg() or member.issparse():
        found.tally.add("members of tars that are links or no plain files are left out", name, "store the files")
        return
    if member.size < 0 or member.offset_data + member.size > num_bytes:
        raise tarfile.ReadError("unexpected end of data")
    if suffix in IMAGE_SUFFIXES:
        if found.by_name.pop(name, None):
            found.tally.add("members of tars are left out, because another one of the same name follows", name)
        found.by_name[name] = _Member(name, member.offset_data, member.size)
    elif suffix in (".cls", ".json"):
        handle = tar.extractfile(member) if member.size <= _SMALL_BYTES else None
        text = _label(handle.read() if handle else b"", suffix)
        if text is None and suffix == ".cls":
            found.tally.add("labels cannot be read", name, "a .cls holds the number or the name of a class")
        elif text is not None:
            (found.labels if suffix == ".cls" else found.facts)[name.rpartition(".")[0]] = text
    elif suffix not in (".txt",):  # captions
        found.tally.add(*unknown_kind(name))


def _label(content: bytes, suffix: str) -> str | None:
    """The class in a .cls or .json member, as text; None if there is none."""
    try:
        text = content.decode("utf-8-sig").strip()
        if suffix == ".json":
            parsed = json.loads(text)
            text = _stated(parsed) if isinstance(parsed, Mapping) else ""
    except ValueError:
        return None
    return text if text and text.isprintable() and len(text) <= _LONGEST_NAME else None


def _stated(facts: Mapping[str, Any]) -> str:
    for key in _LABEL_KEYS:
        value = facts.get(key)
        if isinstance(value, (int, float, str)) and str(value).strip():
            return str(value).strip()
    return ""


def _stream(storage: Storage, path: str) -> Any:
    if storage.is_local:
        return open(path, "rb")
    return io.BufferedReader(_Raw(storage.open(path)), _READ_AHEAD_BYTES)


class _Raw(io.RawIOBase):
    """A pyarrow file as Python's buffered reader wants it."""

    def __init__(self, handle: pa.NativeFile) -> None:
        self._handle = handle

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._handle.seek(offset, whence)
        return int(self._handle.tell())

    def tell(self) -> int:
        return int(self._handle.tell())

    def readinto(self, buffer: Any) -> int:
        return int(self._handle.readinto(buffer))
