"""Where images come from: one small, picklable object per collection, whatever its layout.

A source knows how many rows each of its chunks has and reads any rows of one chunk; who reads what, and when, is the
business of order.py. Opening a source checks it: what is missing or damaged is said before time is lost.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixmae.data.order import Int64Array

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "class_id")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
_PARQUET_MAGIC = b"PAR1"


class DataError(ValueError):
    """The data that a user handed over cannot be used as it is; the message says what to do."""


@dataclass(frozen=True)
class Sample:
    """One stored image."""

    data: bytes
    """The image file's bytes, not decoded."""
    label: int
    """Class index, -1 where there is none."""
    where: str
    """The shard with the row inside it, and the file's original path if the shard kept it."""
    restart_offsets: NDArray[np.uint32] | None = None
    """Where the tiles of a retiled JPEG begin (tiles.py); None for any other file."""


class Source(Protocol):
    """A collection of images in a fixed storage order."""

    @property
    def name(self) -> str:
        """A short name for logs and for the tracker."""

    @property
    def digest(self) -> str:
        """16 hex digits over names, sizes and row counts: another digest is other data."""

    @property
    def chunk_sizes(self) -> Int64Array:
        """Rows of every chunk in storage order: (num_chunks,) int64."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, or None if they are not known."""

    @property
    def has_labels(self) -> bool:
        """Whether any row has a class."""

    @property
    def num_rows(self) -> int:
        """Rows in all chunks."""

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        """The samples at these places of one chunk, in the order asked for."""

    def where(self, row: int) -> str:
        """Where a row, counted over the whole source, is stored; for people."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParquetSource:
    """Images in Parquet files: a struct of bytes and path, or plain bytes, beside an optional integer label."""

    name: str
    digest: str
    files: tuple[str, ...]
    """Absolute paths in storage order."""
    chunk_sizes: Int64Array
    chunk_files: Int64Array
    """(num_chunks,) index into `files`."""
    chunk_groups: Int64Array
    """(num_chunks,) row group inside the file."""
    chunk_offsets: Int64Array
    """(num_chunks,) first row of the chunk inside its file."""
    image_column: str
    has_paths: bool
    """Whether the image column is a struct that also keeps the original path."""
    label_column: str | None
    class_names: tuple[str, ...] | None
    has_labels: bool

    @cached_property
    def num_rows(self) -> int:
        return int(self.chunk_sizes.sum())

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        path = self.files[self.chunk_files[chunk]]
        columns = [self.image_column] + ([self.label_column] if self.label_column else [])
        handle = _parquet_file(path, threading.get_ident())
        table = handle.read_row_group(int(self.chunk_groups[chunk]), columns=columns, use_threads=False)
        images = table.column(self.image_column).combine_chunks()
        labels = table.column(self.label_column).combine_chunks() if self.label_column else None
        stored, paths = (images, None) if not pa.types.is_struct(images.type) else (images.field("bytes"), None)
        if self.has_paths:
            paths = images.field("path")
        offset = int(self.chunk_offsets[chunk])
        samples = []
        for row in rows_in_chunk:
            row = int(row)
            data, label = stored[row].as_py(), labels[row].as_py() if labels is not None else None
            original = paths[row].as_py() if paths is not None else None
            where = f"{path}#{offset + row}" + (f" / {original}" if original else "")
            samples.append(Sample(data or b"", int(label) if label is not None else -1, where))
        return samples

    def where(self, row: int) -> str:
        chunk, inside = chunk_of(self, row)
        return self.read(chunk, [inside])[0].where


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRange:
    """The rows [start, stop) of another source, as a source."""

    base: Source
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.base.num_rows:
            raise DataError(
                f"rows {self.start} to {self.stop} are not inside the {self.base.num_rows} rows of a source"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name}[{self.start}:{self.stop}]"

    @property
    def digest(self) -> str:
        return _short_digest(f"{self.base.digest} {self.start} {self.stop}")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.base.class_names

    @property
    def has_labels(self) -> bool:
        return self.base.has_labels

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @cached_property
    def _first_chunk(self) -> int:
        return chunk_of(self.base, self.start)[0]

    @cached_property
    def _skipped(self) -> int:
        """Rows of the first chunk that come before the range."""
        return chunk_of(self.base, self.start)[1]

    @cached_property
    def chunk_sizes(self) -> Int64Array:
        last = chunk_of(self.base, self.stop - 1)[0]
        ends = np.cumsum(self.base.chunk_sizes[: last + 1])[self._first_chunk :]
        edges = np.concatenate([[self.start], np.minimum(ends, self.stop)])
        return np.diff(edges).astype(np.int64)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        rows = np.asarray(rows_in_chunk, dtype=np.int64)
        return self.base.read(self._first_chunk + chunk, rows + self._skipped if chunk == 0 else rows)

    def where(self, row: int) -> str:
        return self.base.where(self.start + row)


def chunk_of(source: Source, row: int) -> tuple[int, int]:
    """The chunk that holds a row of the source, and the row's place in it."""
    ends = np.cumsum(source.chunk_sizes)
    chunk = int(np.searchsorted(ends, row, side="right"))
    return chunk, int(row - (ends[chunk] - source.chunk_sizes[chunk]))


def open_source(path: str | Path, split: str = "train") -> Source:
    """Open a collection of images and check that it is whole.

    Args:   path: a folder of Parquet files, searched through its subfolders, or one Parquet file.
            split: train, validation or test, told by the files' names; files without such a name are all "train".
    Raises: DataError if nothing is there, a file is damaged, or no column holds images.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split called {split!r}: choose one of {', '.join(SPLITS)}")
    root = Path(path).expanduser()
    by_split = _parquet_files(root)
    files = by_split.get(split)
    if not files:
        found = ", ".join(sorted(by_split))
        raise DataError(f"{root} has no {split} split, only {found}: name one of these, or hold out rows of another")
    return _open_parquet(root, split, files)


def list_splits(path: str | Path) -> tuple[str, ...]:
    """The splits of a folder of Parquet files, in the order of SPLITS.   Raises: DataError if there is none."""
    by_split = _parquet_files(Path(path).expanduser())
    return tuple(split for split in SPLITS if split in by_split)


def split_holdout(source: Source, num_rows: int) -> tuple[Source, Source]:
    """Cut the last rows off a source: (what remains for training, what is held out).

    A set that is stored by class gives a held-out part of few classes; make_shards shuffles, so ours do not.
    """
    if not 0 < num_rows < source.num_rows:
        raise DataError(
            f"cannot hold out {num_rows} of the {source.num_rows} images of {source.name}: choose 1 to all but one"
        )
    cut = source.num_rows - num_rows
    return RowRange(base=source, start=0, stop=cut), RowRange(base=source, start=cut, stop=source.num_rows)


def open_train_and_held_out(path: str | Path, holdout_rows: int = 1000) -> tuple[Source, Source]:
    """The training split, and the validation split or, where there is none, the training set's last rows.

    Args: holdout_rows: at most so many are cut off, and never more than a tenth of the set.
    """
    train = open_source(path, "train")
    if "validation" in list_splits(path):
        return train, open_source(path, "validation")
    return split_holdout(train, max(1, min(holdout_rows, train.num_rows // 10)))


def _parquet_files(root: Path) -> dict[str, list[Path]]:
    if not root.exists():
        raise DataError(
            f"the data path {root} does not exist: check the spelling, or make shards there with make_shards"
        )
    if root.is_file():
        files = [root]
        if root.suffix != ".parquet":
            raise DataError(
                f"{root} is a single file that is not Parquet: give a folder of images or of Parquet shards"
            )
    else:
        hidden = [path for path in sorted(root.rglob("*.parquet")) if path.is_file()]
        files = [path for path in hidden if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise DataError(
            f"no Parquet file in {root}: turn a folder of images into shards with "
            f"`python pipelines/make_shards.py {root} OUTPUT` first"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, root) or "", []).append(file)
    unnamed = by_split.pop("", [])
    if unnamed:
        by_split.setdefault("train", []).extend(unnamed)
    return by_split


def _split_of(file: Path, root: Path) -> str | None:
    """The split in a file's name (train-00000-of-00004.parquet) or in its folder's (train/0000.parquet)."""
    word = re.match(r"[a-z]+", file.name.lower())
    if word and word.group() in _SPLIT_WORDS:
        return _SPLIT_WORDS[word.group()]
    return _SPLIT_WORDS.get(file.parent.name.lower()) if file.parent != root else None


def _open_parquet(root: Path, split: str, files: list[Path]) -> ParquetSource:
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(read_footer, files))
    schema = footers[0].schema.to_arrow_schema()
    image_column = _image_column(schema, files[0])
    image_type = schema.field(image_column).type
    label_column = _label_column(schema)
    chunk_files, chunk_groups, chunk_sizes, chunk_offsets = [], [], [], []
    has_labels = False
    for number, (file, footer) in enumerate(zip(files, footers, strict=True)):
        names = footer.schema.to_arrow_schema().names
        missing = [column for column in (image_column, label_column) if column and column not in names]
        if missing:
            raise DataError(f"{file} has no column {missing[0]!r}, unlike {files[0].name}: keep one schema in a folder")
        offset = 0
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            if rows:
                chunk_files.append(number)
                chunk_groups.append(group)
                chunk_sizes.append(rows)
                chunk_offsets.append(offset)
            offset += rows
            if label_column and not has_labels:
                has_labels = _group_has_labels(footer.row_group(group), label_column)
    if not chunk_sizes:
        raise DataError(f"the {split} files in {root} hold no rows: make the shards again")
    facts = [
        f"{file.name} {file.stat().st_size} {footer.num_rows}" for file, footer in zip(files, footers, strict=True)
    ]
    return ParquetSource(
        name=f"{root.resolve().name}/{split}",
        digest=_short_digest("\n".join([*facts, _manifest_digest(root)])),
        files=tuple(str(file.resolve()) for file in files),
        chunk_sizes=np.array(chunk_sizes, dtype=np.int64),
        chunk_files=np.array(chunk_files, dtype=np.int64),
        chunk_groups=np.array(chunk_groups, dtype=np.int64),
        chunk_offsets=np.array(chunk_offsets, dtype=np.int64),
        image_column=image_column,
        has_paths=pa.types.is_struct(image_type) and image_type.get_field_index("path") >= 0,
        label_column=label_column,
        class_names=_class_names(schema, label_column),
        has_labels=has_labels,
    )


def read_footer(file: Path) -> pq.FileMetaData:
    """A Parquet file's footer, after checking that the whole file is there.   Raises: DataError that names the file."""
    remedy = "copy or download it again, or delete it"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(4)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
    if size < 12 or head != _PARQUET_MAGIC:
        raise DataError(f"{file} is not a Parquet file ({size} bytes, no Parquet signature at its start): {remedy}")
    if tail[4:] != _PARQUET_MAGIC or int.from_bytes(tail[:4], "little") + 12 > size:
        raise DataError(f"{file} is truncated: its {size} bytes end without a Parquet footer; {remedy}")
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the footer of {file} is damaged ({str(error).splitlines()[0]}): {remedy}") from error
    body = size - 8 - int.from_bytes(tail[:4], "little")
    for group in range(footer.num_row_groups):
        for number in range(footer.num_columns):
            column = footer.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            if start + column.total_compressed_size > body:
                raise DataError(
                    f"{file} is truncated: row group {group} should reach beyond its {size} bytes; {remedy}"
                )
    return footer


def _image_column(schema: pa.Schema, file: Path) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and holds_bytes(kind.field(place).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    for name in _IMAGE_COLUMNS:
        if name in schema.names and holds_bytes(schema.field(name).type):
            return name
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and holds_bytes(field.type)]
    if structs:
        return str(structs[0])
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise DataError(
        f"{file} has no image column: it holds {columns}; name the column with the encoded files "
        f"'image' (a struct of bytes and path, as Hugging Face writes it, or plain bytes)"
    )


def _label_column(schema: pa.Schema) -> str | None:
    for name in _LABEL_COLUMNS:
        if name in schema.names and pa.types.is_integer(schema.field(name).type):
            return name
    return None


def _group_has_labels(group: Any, label_column: str) -> bool:
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == label_column:
            statistics = column.statistics
            return statistics is None or not statistics.has_min_max or int(statistics.max) >= 0
    return False


def _class_names(schema: pa.Schema, label_column: str | None) -> tuple[str, ...] | None:
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or label_column is None:
        return None
    try:
        names = json.loads(stored)["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(names, dict):  # {"0": "tench", ...} in hand-written metadata
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(str(name) for name in names)


def _manifest_digest(root: Path) -> str:
    try:
        return str(json.loads((root / MANIFEST_NAME).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=32)
def _parquet_file(path: str, thread: int) -> pq.ParquetFile:
    """An open file per thread, so that its footer is parsed once and no two threads share a reader."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read any more ({error}): was it moved or overwritten?") from error
