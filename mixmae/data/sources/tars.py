"""WebDataset tars: KEY.jpg (or png, webp, ...), KEY.cls with the class index, KEY.json with whatever else is known.

The headers are read once; from then on every image is read at its offset. The index is kept as an Arrow file beside the
tar, or under ~/.cache/mixmae if that folder cannot be written or the tar is remote, and is made again when the tar
changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mixmae.data.chunks import Int64Array, cut_chunks
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.folders import IMAGE_SUFFIXES
from mixmae.data.sources.shard_index import read_arrow, write_arrow
from mixmae.data.sources.storage import Storage, StoredFile

_INDEX_FORMAT = b"1"
_LABEL_KEYS = ("label", "cls", "class_id", "class_index")
_SMALL_BYTES = 64 * 1024
"""A larger .cls or .json member is not the label of an image."""
_READ_AHEAD_BYTES = 1024 * 1024
"""Remote tars are read through for their headers: to skip each image would take a request per image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource(Chunked):
    """The images of tar files, in the order of the files and of their members."""

    name: str
    digest: str
    storage: Storage
    files: tuple[str, ...]
    chunk_sizes: Int64Array
    chunk_files: Int64Array
    """(num_chunks,) index into `files`: a chunk lies in one tar."""
    starts: Int64Array
    """(num_rows,) first byte of every image in its tar."""
    lengths: Int64Array
    """(num_rows,) bytes."""
    labels: Int64Array
    """(num_rows,), -1 where there is none."""
    members: Any
    """(num_rows,) Arrow strings: the images' names in their tars."""
    class_names: tuple[str, ...] | None
    has_labels: bool
    exact_reads: bool = True

    @cached_property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        rows = np.asarray(rows_in_chunk, dtype=np.int64) + self.chunks.starts[chunk]
        path = self.files[self.chunk_files[chunk]]
        parts = self.storage.read_ranges(path, self.starts[rows], self.lengths[rows])
        shown = self.storage.shown(path)
        names = [self.members[row].as_py() for row in rows.tolist()]
        return [
            Sample(data, int(self.labels[row]), f"{shown} / {name}", path=name)
            for row, data, name in zip(rows, parts, names, strict=True)
        ]

    def read_labels(self) -> Int64Array:
        return self.labels

    def where(self, row: int) -> str:
        (chunk,), _ = self.chunks.locate([row])
        path = self.files[self.chunk_files[chunk]]
        return f"{self.storage.shown(path)} / {self.members[row].as_py()}"


@dataclass
class _Members:
    """The images of one tar, in its order."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    members: list[str] = field(default_factory=list)


def open_tars(
    storage: Storage, name: str, files: Sequence[StoredFile], class_names: tuple[str, ...] | None = None
) -> TarSource:
    """Open tar files: read their indexes, or their headers where there is none yet.

    Raises: DataError if a tar is damaged, compressed or holds no image.
    """
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda file: _index(storage, file), files))
    sizes = [cut_chunks(table.num_rows) for table in tables]
    whole = pa.concat_tables(tables).combine_chunks()
    starts, lengths, labels = (whole.column(index).to_numpy() for index in range(3))
    facts = [f"{file.relative.rsplit('/', 1)[-1]} {file.num_bytes}" for file in files]
    return TarSource(
        name=name,
        digest=short_digest("\n".join([*facts, str(whole.num_rows)])),
        storage=storage,
        files=tuple(file.path for file in files),
        chunk_sizes=np.concatenate(sizes),
        chunk_files=np.repeat(np.arange(len(files)), [len(part) for part in sizes]),
        starts=starts,
        lengths=lengths,
        labels=labels,
        members=whole.column("member").combine_chunks(),
        class_names=class_names,
        has_labels=bool((labels >= 0).any()),
    )


def _index(storage: Storage, file: StoredFile) -> pa.Table:
    """Start, length, label and name of every image of a tar, from the kept index if the tar has not changed."""
    stamp = {b"format": _INDEX_FORMAT, b"tar": f"{file.num_bytes} {file.modified_ns}".encode()}
    for path in _index_paths(storage, file.path):
        with contextlib.suppress(OSError, pa.ArrowException, DataError):
            kept = read_arrow(Storage(), str(path))
            if kept.schema.metadata == stamp:
                return kept
    found = _read_headers(storage, file)
    table = pa.table(
        {
            "start": pa.array(found.starts, type=pa.int64()),
            "length": pa.array(found.lengths, type=pa.int64()),
            "label": pa.array(found.labels, type=pa.int64()),
            "member": pa.array(found.members, type=pa.large_string()),
        },
        metadata=stamp,
    )
    for path in _index_paths(storage, file.path):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrow(path, table)
            break
    return table


def _index_paths(storage: Storage, path: str) -> Iterator[Path]:
    """The paths where a tar's index may be kept, the best first."""
    if storage.is_local:
        tar = Path(path)
        if os.access(tar.parent, os.W_OK):
            yield tar.with_name(f".{tar.name}.index")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield cache / "mixmae" / "tars" / f"{hashlib.sha256(storage.shown(path).encode()).hexdigest()[:32]}.index"


def _read_headers(storage: Storage, file: StoredFile) -> _Members:
    shown = storage.shown(file.path)
    if file.problem:
        raise DataError(f"{shown} cannot be used ({file.problem}): copy or download it again, or delete it")
    found = _Members()
    key = ("", "")
    image: tarfile.TarInfo | None = None
    label = -1
    facts: dict[str, Any] = {}

    def finish() -> None:
        if image is not None:
            stated = next((facts[name] for name in _LABEL_KEYS if isinstance(facts.get(name), int)), -1)
            found.starts.append(image.offset_data)
            found.lengths.append(image.size)
            found.labels.append(label if label >= 0 else int(stated))
            found.members.append(image.name)

    try:
        with _stream(storage, file.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise the headers of a large tar pile up
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                if (folder, stem) != key:
                    finish()
                    key, image, label, facts = (folder, stem), None, -1, {}
                plain = f".{kind}" in IMAGE_SUFFIXES
                if not stem or member.offset_data + member.size > file.num_bytes:
                    if stem:
                        raise tarfile.ReadError("unexpected end of data")
                elif plain or (image is None and f".{kind.rpartition('.')[2]}" in IMAGE_SUFFIXES):
                    image = member
                elif kind in ("cls", "json") and member.size <= _SMALL_BYTES:
                    handle = tar.extractfile(member)
                    content = handle.read() if handle else b""
                    with contextlib.suppress(ValueError):
                        if kind == "cls":
                            label = int(content)
                        else:
                            parsed = json.loads(content)
                            facts = parsed if isinstance(parsed, dict) else {}
            finish()
    except (tarfile.TarError, EOFError, OSError) as error:
        remedy = "copy or download it again, or delete it"
        with _stream(storage, file.path) as stream:
            if stream.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                remedy = "it is compressed: unpack the compression (gunzip), so that images can be read in any order"
        raise DataError(f"{shown} is not a whole tar file ({error}): {remedy}") from error
    if not found.starts:
        raise DataError(f"{shown} holds no image: its members need names like KEY.jpg, KEY.png or KEY.webp")
    return found


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
