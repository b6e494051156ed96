"""Images in Parquet files: Hugging Face's layouts and our own shards."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixmae.data.account import Met, Tally, escaped
from mixmae.data.chunks import Int64Array
from mixmae.data.source import Chunked, DataError, Sample, short_digest
from mixmae.data.sources.contents import changed, content_digests
from mixmae.data.sources.hub_truth import HubColumns, HubTruth, find_columns, learn_truth, rule_facts
from mixmae.data.sources.labels import number_classes
from mixmae.data.sources.shard_index import (
    LENGTH_BYTES,
    ShardIndex,
    index_is_fresh,
    index_path,
    load_index,
    shard_stamp,
)
from mixmae.data.sources.storage import Storage, StoredFile
from mixmae.data.truth import DenseClasses, Objects, Truth

RESTART_COLUMN = "restart_offsets"
SEGMENTATION_COLUMN, OBJECTS_COLUMN = "segmentation", "objects"
DENSE_KEY = "mixmae.dense"
"""Of the schema's metadata: the classes of pixels and objects (DenseClasses)."""

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_LABEL_COLUMNS = (
    *(
        "label",
        "labels",
        "fine_label",
        "class",
        "cls",
        "class_id",
        "class_index",
        "category",
        "class_name",
        "label_name",
    ),
    "target",
)
_TOO_LARGE = 2**62
"""No class has such a number: it is how -1 or nothing reads in another type."""
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
    storage: Storage
    stored: tuple[StoredFile, ...]
    """The files as they were when the source was opened, in storage order."""
    stamps: tuple[bytes | None, ...]
    """(num_files,) of the shards whose sidecar is there and valid (shard_index), None for the others."""
    checksums: Mapping[str, str]
    """SHA-256 by the paths of shards that are still as their manifest says."""
    num_bytes: int
    chunk_sizes: Int64Array
    chunk_files: Int64Array
    """(num_chunks,) index into `files`."""
    chunk_groups: Int64Array
    """(num_chunks,) row group inside the file."""
    chunk_offsets: Int64Array
    """(num_chunks,) first row of the chunk inside its file."""
    image_column: str
    """A struct of bytes and path, or plain bytes: in each file one of the two."""
    has_restarts: bool
    """Whether there is a column of restart offsets."""
    label_column: str | None
    label_index: Mapping[Any, int] | None
    """Class index by what the label column holds, which is text or truth; None: it holds the index, as a number."""
    class_names: tuple[str, ...] | None
    has_labels: bool
    opened: tuple[Met, ...]
    """What was met when it was opened."""
    own_dense: DenseClasses | None = None
    """What our own shards know about pixels."""
    hub: HubColumns | None = None
    """The columns of truth of files in Hugging Face's layouts."""
    root: str = ""
    """The folder that was named, where files may say what masks mean."""
    others: tuple[StoredFile, ...] = ()
    """Files of other splits."""

    @property
    def files(self) -> tuple[str, ...]:
        """Paths in storage order, absolute if they are local."""
        return tuple(file.path for file in self.stored)

    @property
    def met(self) -> tuple[Met, ...]:
        learnt: HubTruth | None = self.__dict__.get("_hub_truth")
        if learnt is None or not learnt.notes:
            return self.opened
        return (*self.opened, Met(f"{self.opened[0].place}, its objects", {}, learnt.notes))

    @property
    def dense(self) -> DenseClasses | None:
        """What is known about pixels.   Raises: DataError where it is not clear what masks or objects mean."""
        return self.own_dense if self.hub is None else self._hub_truth.dense

    @cached_property
    def _hub_truth(self) -> HubTruth:
        assert self.hub is not None
        return learn_truth(self.hub, self._hub_rows, self.image_column, self.storage, self.root)

    def _hub_rows(self, columns: Sequence[str], also_others: bool) -> Iterator[Mapping[str, Any]]:
        """Rows of the files, and perhaps of those of other splits that have the same columns; see ReadRows."""
        for file in (*self.stored, *(self.others if also_others else ())):
            handle = _parquet_file(self.storage, file.path, self.storage.identity(file.path), threading.get_ident())
            if find_columns(handle.schema_arrow, self.image_column) != self.hub:
                if file in self.stored:
                    raise DataError(
                        f"{self.storage.shown(file.path)} has other columns or classes of masks or objects than "
                        f"{escaped(self.stored[0].relative)}: keep one schema in a folder"
                    )
                continue
            try:
                for batch in handle.iter_batches(batch_size=64, columns=list(columns), use_threads=False):
                    yield from batch.to_pylist()
            except Exception as error:
                raise _unreadable(self.storage, file.path, error) from error

    @property
    def exact_reads(self) -> bool:
        return None not in self.stamps

    @property
    def digest(self) -> str:
        rows = np.bincount(self.chunk_files, weights=self.chunk_sizes, minlength=len(self.stored)).astype(int)
        facts = [
            f"{file.relative.rpartition('/')[2]} {contents} {count}"
            for file, contents, count in zip(self.stored, self._contents, rows, strict=True)
        ]
        facts += [] if self.hub is None else rule_facts(self.storage, self.root)
        return short_digest("\n".join([*facts, repr(self.class_names)]))

    @cached_property
    def _contents(self) -> list[str]:
        """The digest of every file."""
        unknown = [file for file in self.stored if file.path not in self.checksums]
        digests = content_digests(self.storage, self.name + self.stored[0].path, unknown)
        known = {**self.checksums, **{file.path: digest for file, digest in zip(unknown, digests, strict=True)}}
        return [known[file.path] for file in self.stored]

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        number = int(self.chunk_files[chunk])
        file, stamp = self.stored[number], self.stamps[number]
        rows = np.asarray(rows_in_chunk, dtype=np.int64)
        known = self.__dict__.get("_contents")
        if problem := changed(self.storage, file, known[number] if known else self.checksums.get(file.path, "")):
            places = [self._where(file.path, row, "") for row in (rows + self.chunk_offsets[chunk]).tolist()]
            return [Sample(b"", -1, place, problem=problem) for place in places]
        index = load_index(self.storage, index_path(file.path), stamp) if stamp else None
        if index is None:
            return self._read_group(chunk, rows)
        return self._read_exactly(file.path, index, rows + self.chunk_offsets[chunk])

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
        labels = _joined(_plain(table.column(self.label_column))) if self.label_column else None
        restarts = _joined(table.column(RESTART_COLUMN)) if self.has_restarts else None
        stored, paths = images, None
        if pa.types.is_struct(images.type):
            stored = images.field("bytes")
            paths = images.field("path") if images.type.get_field_index("path") >= 0 else None
        offset = int(self.chunk_offsets[chunk])
        samples = []
        for row in rows.tolist():
            data, label = stored[row].as_py(), _value(labels[row]) if labels is not None else None
            original = (_value(paths[row]) if paths is not None else None) or ""
            intervals = None
            if restarts is not None and restarts[row].is_valid:
                intervals = restarts[row].values.to_numpy(zero_copy_only=True)
            where = self._where(path, offset + row, original)
            samples.append(Sample(data or b"", self._class_of(label), where, intervals, original))
        return samples

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        """What is known about rows of one chunk, by whole row groups: their columns of truth are small."""
        if self.dense is None:
            return [Truth() for _ in rows_in_chunk]
        columns = ["image_id", "height", "width"]
        columns += [SEGMENTATION_COLUMN] if self.dense.pixels else []
        columns += [OBJECTS_COLUMN] if self.dense.objects else []
        columns = columns if self.hub is None else self.hub.columns
        path = self.files[self.chunk_files[chunk]]
        table = _row_groups.read(self.storage, path, int(self.chunk_groups[chunk]), columns)
        rows = table.take(pa.array(np.asarray(rows_in_chunk, dtype=np.int64))).to_pylist()
        if self.hub is None:
            return [_truth(row) for row in rows]
        samples = self.read(chunk, rows_in_chunk)
        return [
            self._hub_truth.truth(row, sample.data, sample.where) for row, sample in zip(rows, samples, strict=True)
        ]

    def read_labels(self) -> Int64Array:
        if self.label_column is None:
            return np.full(self.num_rows, -1, dtype=np.int64)
        parts = []
        for path in self.files:
            try:
                handle = _parquet_file(self.storage, path, self.storage.identity(path), threading.get_ident())
                column = handle.read(columns=[self.label_column]).column(0)
            except Exception as error:
                raise _unreadable(self.storage, path, error) from error
            parts.append(_class_indices(column, self.label_index))
        return np.concatenate(parts)

    def _class_of(self, label: Any) -> int:
        if label is None:
            return -1
        if self.label_index is not None:
            return self.label_index.get(label, -1)
        return int(label) if 0 <= label < _TOO_LARGE else -1

    def _where(self, path: str, row: int, original: str) -> str:
        return f"{self.storage.shown(path)}#{row}" + (f" / {original}" if original else "")

    def where(self, row: int) -> str:
        (chunk,), within = self.chunks.locate([row])
        return self.read(int(chunk), within)[0].where


def open_parquet(
    storage: Storage,
    name: str,
    files: Sequence[StoredFile],
    sidecars: Collection[str],
    *,
    root: str = "",
    manifest: Mapping[str, Any] = MappingProxyType({}),
    others: Sequence[StoredFile] = (),
    met: Sequence[Met] = (),
) -> ParquetSource:
    """Open Parquet files with the same columns and check that they are whole.

    Args:   sidecars: paths of the index files that are there.  root: the folder that was named.
            manifest: of the set, if it has one.
            others: files of other splits, whose classes have numbers of the same range.  met: of the collection.
    Raises: DataError if a file is damaged, no column holds images, or the images are not in the files.
    """

    def check(file: StoredFile) -> tuple[pq.FileMetaData, bytes | None]:
        footer, stamp = read_footer(storage, file)
        sidecar = index_path(file.path)
        fresh = sidecar in sidecars and index_is_fresh(storage, sidecar, stamp, footer.num_rows)
        return footer, stamp if fresh else None

    with ThreadPoolExecutor(16) as pool:
        checked = list(pool.map(check, files))
    footers = [footer for footer, _ in checked]
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    schema = schemas[0]
    image_column = _image_column(schema, storage.shown(files[0].path))
    hub = None if RESTART_COLUMN in schema.names else find_columns(schema, image_column)  # our shards say it themselves
    label_column, notes = _label_column(schema, storage.shown(files[0].path), hub.columns if hub else ())
    for file, (_, stamp) in zip(files, checked, strict=True):
        if stamp is None and index_path(file.path) in sidecars:
            notes.add(
                "sidecars (.index) are damaged or another shard's: whole row groups are read",
                index_path(file.relative),
                "delete them, or make the shards again",
            )
    has_restarts = _has_restarts(schema)
    for file, own in zip(files, schemas, strict=True):
        _check_alike(storage, file, own, files[0], schema, image_column, label_column, has_restarts)
    are_numbered = label_column is not None and all(
        pa.types.is_integer(own.field(label_column).type) for own in schemas
    )
    chunk_files, chunk_groups, chunk_sizes, chunk_offsets = [], [], [], []
    has_labels, num_rows, num_without = False, 0, 0
    for number, (file, footer) in enumerate(zip(files, footers, strict=True)):
        offset = 0
        with _footer_of(storage.shown(file.path)):
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                if rows:
                    chunk_files.append(number)
                    chunk_groups.append(group)
                    chunk_sizes.append(rows)
                    chunk_offsets.append(offset)
                offset += rows
                num_without += _images_missing(footer.row_group(group), image_column)
                if label_column and are_numbered and not has_labels:
                    has_labels = _group_has_labels(footer.row_group(group), label_column)
            num_rows += offset
    if not chunk_sizes:
        raise DataError(f"the files of {name} hold no rows: make the shards again")
    if num_without == num_rows:
        raise DataError(
            f"the images are not in {storage.shown(files[0].path)}: the column {image_column!r} holds only their "
            "paths; store their bytes too (push_to_hub of `datasets` does), or give a list of the files (.txt)"
        )
    if num_without:
        notes.add("rows have no image", f"one in the column {image_column!r}", "store its bytes", num_without)
    label_index, class_names = None, _class_names(schema, label_column)
    if label_column and not are_numbered:
        texts = _values(storage, [*files, *others], label_column)
        label_index, class_names = _label_index(texts, class_names, label_column, notes)
        has_labels = label_index is None or any(number >= 0 for number in label_index.values())
    place = f"{storage.shown(files[0].path.rpartition('/')[0])} {name}"
    return ParquetSource(
        name=name,
        storage=storage,
        stored=tuple(files),
        stamps=tuple(stamp for _, stamp in checked),
        checksums=_checksums(files, manifest) if storage.is_local else {},
        num_bytes=sum(file.num_bytes for file in files),
        chunk_sizes=np.array(chunk_sizes, dtype=np.int64),
        chunk_files=np.array(chunk_files, dtype=np.int64),
        chunk_groups=np.array(chunk_groups, dtype=np.int64),
        chunk_offsets=np.array(chunk_offsets, dtype=np.int64),
        image_column=image_column,
        has_restarts=has_restarts,
        label_column=label_column,
        label_index=label_index,
        class_names=class_names,
        has_labels=has_labels,
        own_dense=_dense_classes(schema),
        hub=hub,
        root=root,
        others=tuple(others),
        opened=(
            Met(place, {"Parquet files": len(files), "rows": num_rows}, notes.notes),
            *_packed(storage, files, manifest),
            *met,
        ),
    )


def _packed(storage: Storage, files: Sequence[StoredFile], manifest: Mapping[str, Any]) -> tuple[Met, ...]:
    """What make_shards met in the collection that these shards were made of."""
    try:
        place = f"{storage.shown(files[0].path.rpartition('/')[0])}, when it was packed"
        return (Met.from_json(place, manifest["met"]),)
    except (KeyError, TypeError, AttributeError):
        return ()


def _checksums(files: Sequence[StoredFile], manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by path of the shards that have not been written since their manifest was, which is last."""
    try:
        listed = [shard for split in manifest["splits"].values() for shard in split["files"]]
        known = {shard["name"]: (shard["bytes"], shard["sha256"]) for shard in listed}
    except (KeyError, TypeError, AttributeError):  # somebody else's manifest
        return {}
    checksums = {}
    for file in files:
        size, digest = known.get(file.relative.rpartition("/")[2], (-1, ""))
        if size == file.num_bytes and max(file.modified_ns, file.changed_ns) <= manifest["written_ns"]:
            checksums[file.path] = digest
    return checksums


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
    with _footer_of(shown):
        # A file that holds only a footer has the same metadata.
        footer = pq.read_metadata(pa.BufferReader(_MAGIC + tail[-footer_bytes:]))
        footer.schema.to_arrow_schema()
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
    for name in _IMAGE_COLUMNS:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            return name
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and _holds_bytes(field.type)]
    if structs:
        return str(structs[0])
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise DataError(
        f"{shown} has no image column: it holds {columns}; name the column with the encoded files "
        f"'image' (a struct of bytes and path, as Hugging Face writes it, or plain bytes)"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _label_column(schema: pa.Schema, shown: str, taken: Collection[str]) -> tuple[str | None, Tally]:
    """The column with the classes, if there is one, and a note if one of such a name cannot be read.

    Args: taken: columns that are known to hold something else.
    """
    tally = Tally()
    for name in _LABEL_COLUMNS:
        if name in schema.names and name not in taken:
            if _label_kind(schema.field(name).type):
                return name, tally
            what = f"columns of labels cannot be read, {name!r} of type {schema.field(name).type}"
            tally.add(what, shown, "store a number or a name for each image")
    return None, tally


def _label_kind(kind: pa.DataType) -> str:
    """What a column of labels holds: "number", "text" or "truth"; "" for anything else."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "truth"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else ""


def _check_alike(
    storage: Storage,
    file: StoredFile,
    schema: pa.Schema,
    first_file: StoredFile,
    first: pa.Schema,
    image_column: str,
    label_column: str | None,
    has_restarts: bool,
) -> None:
    """Refuse a file whose columns cannot be read as those of the first one.   Raises: DataError."""
    dense = _dense_classes(first)
    if _dense_classes(schema) != dense:
        raise DataError(
            f"{storage.shown(file.path)} has other classes of pixels or objects than {escaped(first_file.relative)}: "
            f"keep one set in a folder"
        )
    needed = (image_column, label_column, RESTART_COLUMN if has_restarts else None)
    missing = [column for column in needed if column and column not in schema.names]
    if missing:
        raise DataError(
            f"{storage.shown(file.path)} has no column {missing[0]!r}, unlike {escaped(first_file.relative)}: keep one "
            f"schema in a folder"
        )
    ours, theirs = (schema.field(image_column).type for schema in (schema, first))
    if not _holds_bytes(ours):
        raise DataError(
            f"the column {image_column!r} of {storage.shown(file.path)} is {ours}, which holds no image files, and in "
            f"{escaped(first_file.relative)} it is {theirs}: keep one schema in a folder"
        )
    if label_column and _label_kind(schema.field(label_column).type) != _label_kind(first.field(label_column).type):
        raise DataError(
            f"the column {label_column!r} of {storage.shown(file.path)} is {schema.field(label_column).type}, and in "
            f"{escaped(first_file.relative)} it is {first.field(label_column).type}: keep one schema in a folder"
        )


def _values(storage: Storage, files: Sequence[StoredFile], column: str) -> list[Any]:
    """The different values of a column, without null.   Raises: DataError."""
    values: set[Any] = set()
    for file in files:
        try:
            with storage.open(file.path) as stream:
                whole = pq.ParquetFile(stream).read(columns=[column]).column(0)
        except Exception as error:
            raise _unreadable(storage, file.path, error) from error
        values.update(map(_value, _plain(whole).unique().drop_null()))
    return list(values)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _value(scalar: Any) -> Any:
    """A value as Python has it; in text, bytes that are not UTF-8 are escaped."""
    if not scalar.is_valid or _label_kind(scalar.type) != "text":
        return scalar.as_py()
    return bytes(scalar.as_buffer()).decode(errors="backslashreplace")


def _label_index(
    values: Sequence[Any], class_names: tuple[str, ...] | None, column: str, notes: Tally
) -> tuple[Mapping[Any, int] | None, tuple[str, ...] | None]:
    """The class of every value of a column that holds no integers, and the names of the classes."""
    if all(isinstance(value, bool) for value in values):
        return {False: 0, True: 1}, class_names or ("false", "true")
    if all(isinstance(value, str) for value in values):
        texts, names = number_classes(values, class_names)
        strange = sorted({value for value in values if value.strip() and value.strip() not in texts})
        if strange:
            notes.add(f"values of the column {column!r} name no class", strange[0], count=len(strange))
        return {value: texts[value.strip()] for value in values if value.strip() in texts}, names
    numbers = [value for value in values if value == value]  # without NaN, which is how others write "none"
    whole = {value: max(-1, int(value)) for value in numbers if abs(value) < _TOO_LARGE and value == int(value)}
    broken = sorted(float(value) for value in numbers if value not in whole)
    if broken:
        what = f"values of the column {column!r} are no whole numbers, and their images have no class"
        notes.add(what, str(broken[0]), "number the classes from 0", len(broken))
    return whole, class_names


def _class_indices(column: pa.ChunkedArray, index: Mapping[Any, int] | None) -> Int64Array:
    """The class of every row of a label column."""
    column = _plain(column)
    if index is None:
        numbers = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        return np.maximum(numbers, -1)  # so that the largest unsigned number, too, is none
    encoded = column.combine_chunks().dictionary_encode() if column.num_chunks else pa.array([]).dictionary_encode()
    known = [index.get(_value(value), -1) for value in encoded.dictionary]
    return np.array([*known, -1], dtype=np.int64)[encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)]


def _images_missing(group: Any, image_column: str) -> int:
    """Rows of a row group without an image, as far as its statistics say."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema in (image_column, f"{image_column}.bytes"):
            statistics = column.statistics
            return int(statistics.null_count) if statistics is not None and statistics.has_null_count else 0
    return 0


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


def _dense_classes(schema: pa.Schema) -> DenseClasses | None:
    """What our own shards know about pixels."""
    stored = (schema.metadata or {}).get(DENSE_KEY.encode())
    return None if stored is None else DenseClasses.from_json(json.loads(stored))


def _truth(row: Mapping[str, Any]) -> Truth:
    """The truth of a row.   Args: row: its columns as Python has them."""
    lists, objects = row.get(OBJECTS_COLUMN), None
    if lists is not None:
        objects = Objects(
            boxes=np.array(lists["bbox"], dtype=np.float32).reshape(-1, 4),
            labels=np.array(lists["category"], dtype=np.int64),
            areas=np.array(lists["area"], dtype=np.float32),
            crowd=np.array(lists["iscrowd"], dtype=np.bool_),
            ids=np.array(lists["id"], dtype=np.int64),
            masks=tuple(mask or b"" for mask in lists["rle"]),
        )
    return Truth(
        segmentation=(row.get(SEGMENTATION_COLUMN) or {}).get("bytes") or b"",
        objects=objects,
        problem="it has no annotation that can be used (manifest.json of the shards says why)",
        image_id=row["image_id"],
        size=(row["height"], row["width"]),
    )


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; combine_chunks copies even a single chunk, here up to a whole row group of images."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _unreadable(storage: Storage, path: str, error: Exception) -> Exception:
    """What to raise for any error of pyarrow, which raises whatever it likes on damaged bytes."""
    if isinstance(error, DataError):
        return error
    return DataError(
        f"{storage.shown(path)} cannot be read any more ({_first_line(error)}): was it moved or overwritten?"
    )


@contextlib.contextmanager
def _footer_of(shown: str) -> Iterator[None]:
    """Turn any error into one that says that a file's footer is damaged."""
    try:
        yield
    except Exception as error:  # pyarrow raises whatever it likes on damaged bytes
        raise DataError(
            f"the footer of {shown} is damaged ({_first_line(error)}): copy or download it again, or delete it"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=32)
def _parquet_file(storage: Storage, path: str, identity: tuple[int, ...], thread: int) -> pq.ParquetFile:
    """An open file per thread, so that its footer is parsed once and no two threads share a reader."""
    try:
        if storage.is_local:
            return pq.ParquetFile(pa.memory_map(os.fsencode(path)))
        # Buffered ahead, the column chunks of a row group come in few requests.
        return pq.ParquetFile(storage.filesystem.open_input_file(path), pre_buffer=True)
    except Exception as error:
        raise _unreadable(storage, path, error) from error


class _RowGroups:
    """The row groups that were read last, for all threads of a process.

    Neighbouring blocks take their rows from the same window, and with it from the same row groups. They are kept as
    they were read, so that only the images that are asked for are copied.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[tuple[Storage, str, tuple[int, ...], int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def read(self, storage: Storage, path: str, group: int, columns: list[str]) -> pa.Table:
        """Read a row group.   Raises: DataError."""
        identity = storage.identity(path)
        key = (storage, path, identity, group, tuple(columns))
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        handle = _parquet_file(storage, path, identity, threading.get_ident())
        try:
            table = handle.read_row_group(group, columns=columns, use_threads=False)
        except Exception as error:
            raise _unreadable(storage, path, error) from error
        with self._lock:
            if table.nbytes <= self._limit and key not in self._held:
                self._held[key] = table
                self._total += table.nbytes
            while self._total > self._limit:
                self._total -= self._held.popitem(last=False)[1].nbytes
        return table


_row_groups = _RowGroups(_CACHE_BYTES)
