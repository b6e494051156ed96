"""Images in Parquet files: Hugging Face's layouts and our own shards."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixmae.data.chunks import Int64Array
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.shard_index import (
    LENGTH_BYTES,
    ShardIndex,
    index_is_fresh,
    index_path,
    load_index,
    shard_stamp,
)
from mixmae.data.sources.storage import Storage, StoredFile

RESTART_COLUMN = "restart_offsets"

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "class_id")
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
"""Read at once from a file's end: most footers fit."""
_CACHE_BYTES = 192_000_000
"""Room for a window of the plan (1024 images of 107 KB), and most of the next one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParquetSource(Chunked):
    """Images in Parquet files: a struct of bytes and path, or plain bytes, beside an optional integer label.

    Rows of a shard with a valid sidecar are read one by one at their addresses, others by row groups.
    """

    name: str
    digest: str
    storage: Storage
    files: tuple[str, ...]
    """Paths in storage order, absolute if they are local."""
    stamps: tuple[bytes | None, ...]
    """(num_files,) of the shards whose sidecar is there and valid (shard_index), None for the others."""
    num_bytes: int
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
    has_restarts: bool
    """Whether there is a column of restart offsets."""
    label_column: str | None
    class_names: tuple[str, ...] | None
    has_labels: bool

    @property
    def exact_reads(self) -> bool:
        return None not in self.stamps

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        file = int(self.chunk_files[chunk])
        stamp = self.stamps[file]
        rows = np.asarray(rows_in_chunk, dtype=np.int64)
        index = load_index(self.storage, index_path(self.files[file]), stamp) if stamp else None
        if index is None:
            return self._read_group(chunk, rows)
        return self._read_exactly(self.files[file], index, rows + self.chunk_offsets[chunk])

    def _read_exactly(self, path: str, index: ShardIndex, rows: Int64Array) -> list[Sample]:
        # The length before each value is read too: it proves that the address is right.
        parts = self.storage.read_ranges(path, index.offsets[rows] - LENGTH_BYTES, index.lengths[rows] + LENGTH_BYTES)
        samples = []
        for row, part in zip(rows.tolist(), parts, strict=True):
            length = int(index.lengths[row])
            if length and int.from_bytes(part[:LENGTH_BYTES], "little") != length:
                raise DataError(f"{self.storage.shown(path)} has changed since it was opened: was it overwritten?")
            original = index.paths[row].as_py() or ""
            where = self._where(path, row, original)
            data = part[LENGTH_BYTES:] if length else b""
            samples.append(Sample(data, int(index.labels[row]), where, index.restart_offsets(row), original))
        return samples

    def _read_group(self, chunk: int, rows: Int64Array) -> list[Sample]:
        path = self.files[self.chunk_files[chunk]]
        columns = [name for name in (self.image_column, self.label_column) if name]
        columns += [RESTART_COLUMN] if self.has_restarts else []
        table = _row_groups.read(self.storage, path, int(self.chunk_groups[chunk]), columns)
        images = _joined(table.column(self.image_column))
        labels = _joined(table.column(self.label_column)) if self.label_column else None
        restarts = _joined(table.column(RESTART_COLUMN)) if self.has_restarts else None
        stored, paths = (images, None) if not pa.types.is_struct(images.type) else (images.field("bytes"), None)
        if self.has_paths:
            paths = images.field("path")
        offset = int(self.chunk_offsets[chunk])
        samples = []
        for row in rows.tolist():
            data, label = stored[row].as_py(), labels[row].as_py() if labels is not None else None
            original = (paths[row].as_py() if paths is not None else None) or ""
            intervals = None
            if restarts is not None and restarts[row].is_valid:
                intervals = restarts[row].values.to_numpy(zero_copy_only=True)
            where = self._where(path, offset + row, original)
            samples.append(Sample(data or b"", int(label) if label is not None else -1, where, intervals, original))
        return samples

    def read_labels(self) -> Int64Array:
        if self.label_column is None:
            return np.full(self.num_rows, -1, dtype=np.int64)
        parts = []
        for path in self.files:
            try:
                handle = _parquet_file(self.storage, path, self.storage.identity(path), threading.get_ident())
                column = handle.read(columns=[self.label_column]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(self.storage, path, error) from error
            parts.append(column.cast(pa.int64()).fill_null(-1).to_numpy())
        return np.concatenate(parts)

    def _where(self, path: str, row: int, original: str) -> str:
        return f"{self.storage.shown(path)}#{row}" + (f" / {original}" if original else "")

    def where(self, row: int) -> str:
        (chunk,), within = self.chunks.locate([row])
        return self.read(int(chunk), within)[0].where


def open_parquet(
    storage: Storage, name: str, files: Sequence[StoredFile], sidecars: Collection[str], manifest_digest: str = ""
) -> ParquetSource:
    """Open Parquet files of one schema and check that they are whole.

    Args:   sidecars: paths of the index files that are there.  manifest_digest: of the set's manifest, if it has one.
    Raises: DataError if a file is damaged or no column holds images.
    """

    def check(file: StoredFile) -> tuple[pq.FileMetaData, bytes | None]:
        footer, stamp = read_footer(storage, file)
        sidecar = index_path(file.path)
        fresh = sidecar in sidecars and index_is_fresh(storage, sidecar, stamp, footer.num_rows)
        return footer, stamp if fresh else None

    with ThreadPoolExecutor(16) as pool:
        checked = list(pool.map(check, files))
    footers = [footer for footer, _ in checked]
    schema = footers[0].schema.to_arrow_schema()
    image_column = _image_column(schema, storage.shown(files[0].path))
    image_type = schema.field(image_column).type
    label_column = _label_column(schema)
    has_restarts = _has_restarts(schema)
    chunk_files, chunk_groups, chunk_sizes, chunk_offsets = [], [], [], []
    has_labels = False
    for number, (file, footer) in enumerate(zip(files, footers, strict=True)):
        names = footer.schema.to_arrow_schema().names
        needed = (image_column, label_column, RESTART_COLUMN if has_restarts else None)
        missing = [column for column in needed if column and column not in names]
        if missing:
            raise DataError(
                f"{storage.shown(file.path)} has no column {missing[0]!r}, unlike {files[0].relative}: keep one schema "
                f"in a folder"
            )
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
        raise DataError(f"the files of {name} hold no rows: make the shards again")
    facts = [
        f"{file.relative.rsplit('/', 1)[-1]} {file.num_bytes} {footer.num_rows}"
        for file, footer in zip(files, footers, strict=True)
    ]
    return ParquetSource(
        name=name,
        digest=short_digest("\n".join([*facts, manifest_digest])),
        storage=storage,
        files=tuple(file.path for file in files),
        stamps=tuple(stamp for _, stamp in checked),
        num_bytes=sum(file.num_bytes for file in files),
        chunk_sizes=np.array(chunk_sizes, dtype=np.int64),
        chunk_files=np.array(chunk_files, dtype=np.int64),
        chunk_groups=np.array(chunk_groups, dtype=np.int64),
        chunk_offsets=np.array(chunk_offsets, dtype=np.int64),
        image_column=image_column,
        has_paths=pa.types.is_struct(image_type) and image_type.get_field_index("path") >= 0,
        has_restarts=has_restarts,
        label_column=label_column,
        class_names=_class_names(schema, label_column),
        has_labels=has_labels,
    )


def read_footer(storage: Storage, file: StoredFile) -> tuple[pq.FileMetaData, bytes]:
    """A Parquet file's footer and its stamp (shard_index), after checking that the whole file is there.

    Raises: DataError that names the file.
    """
    remedy = "copy or download it again, or delete it"
    shown, size = storage.shown(file.path), file.num_bytes
    if file.problem and file.problem != "empty":
        raise DataError(f"{shown} cannot be read ({file.problem}): make it readable, or delete it")
    with storage.open(file.path) as stream:
        head = stream.read_at(4, 0)
        tail = stream.read_at(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
        if size < 12 or head != _MAGIC:
            raise DataError(
                f"{shown} is not a Parquet file ({size} bytes, no Parquet signature at its start): {remedy}"
            )
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or footer_bytes + 4 > size:
            raise DataError(f"{shown} is truncated: its {size} bytes end without a Parquet footer; {remedy}")
        if footer_bytes > len(tail):
            tail = stream.read_at(footer_bytes, size - footer_bytes)
    try:
        # A file that holds only a footer has the same metadata.
        footer = pq.read_metadata(pa.BufferReader(_MAGIC + tail[-footer_bytes:]))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the footer of {shown} is damaged ({str(error).splitlines()[0]}): {remedy}") from error
    for group in range(footer.num_row_groups):
        for number in range(footer.num_columns):
            column = footer.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            if start + column.total_compressed_size > size - footer_bytes:
                raise DataError(
                    f"{shown} is truncated: row group {group} should reach beyond its {size} bytes; {remedy}"
                )
    return footer, shard_stamp(size, tail)


def _image_column(schema: pa.Schema, shown: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and holds_bytes(kind.field(index).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    for name in _IMAGE_COLUMNS:
        if name in schema.names and holds_bytes(schema.field(name).type):
            return name
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and holds_bytes(field.type)]
    if structs:
        return str(structs[0])
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise DataError(
        f"{shown} has no image column: it holds {columns}; name the column with the encoded files "
        f"'image' (a struct of bytes and path, as Hugging Face writes it, or plain bytes)"
    )


def _label_column(schema: pa.Schema) -> str | None:
    for name in _LABEL_COLUMNS:
        if name in schema.names and pa.types.is_integer(schema.field(name).type):
            return name
    return None


def _has_restarts(schema: pa.Schema) -> bool:
    index = schema.get_field_index(RESTART_COLUMN)
    return index >= 0 and schema.field(index).type == pa.list_(pa.uint32())


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


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; combine_chunks copies even a single chunk, here up to a whole row group of images."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _unreadable(storage: Storage, path: str, error: Exception) -> DataError:
    return DataError(f"{storage.shown(path)} cannot be read any more ({error}): was it moved or overwritten?")


@lru_cache(maxsize=32)
def _parquet_file(storage: Storage, path: str, identity: tuple[int, ...], thread: int) -> pq.ParquetFile:
    """An open file per thread, so that its footer is parsed once and no two threads share a reader."""
    try:
        if storage.is_local:
            return pq.ParquetFile(path, memory_map=True)
        # Buffered ahead, the column chunks of a row group come in few requests.
        return pq.ParquetFile(storage.filesystem.open_input_file(path), pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(storage, path, error) from error


class _RowGroups:
    """The row groups that were read last, for all threads of a process.

    Neighbouring blocks take their rows from the same window, and with it from the same row groups. They are kept as
    they were read, so that only the images that are asked for are copied.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[tuple[Storage, str, tuple[int, ...], int], pa.Table] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def read(self, storage: Storage, path: str, group: int, columns: list[str]) -> pa.Table:
        """Read a row group.   Raises: DataError."""
        identity = storage.identity(path)
        key = (storage, path, identity, group)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        handle = _parquet_file(storage, path, identity, threading.get_ident())
        try:
            table = handle.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(storage, path, error) from error
        with self._lock:
            if table.nbytes <= self._limit and key not in self._held:
                self._held[key] = table
                self._total += table.nbytes
            while self._total > self._limit:
                self._total -= self._held.popitem(last=False)[1].nbytes
        return table


_row_groups = _RowGroups(_CACHE_BYTES)
