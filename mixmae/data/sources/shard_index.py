"""The sidecar of a shard: the address of every image's bytes, so that a reader fetches these and nothing else.

`train-00000-of-00004.index` is an Arrow file with a row for each row of `train-00000-of-00004.parquet`: offset and
length of the image's bytes, label, path and restart offsets. Its metadata holds the shard's size and the checksum of
its footer: if the shard is written again, the sidecar no longer counts; and a checksum of its own columns: neither does
it if a label or an address is not what was written. Without one, readers fetch whole row groups.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as pa_ipc
from numpy.typing import NDArray

from mixmae.data.chunks import Int64Array
from mixmae.data.source import DataError
from mixmae.data.sources.storage import INDEX_SUFFIX, Storage
from mixmae.writing import writing

LENGTH_BYTES = 4
"""Parquet's plain encoding writes a value's length, 4 bytes little-endian, before its bytes."""

_SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("label", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("restart_offsets", pa.large_list(pa.uint32())),
    ]
)
_STAMP = b"shard"
_DIGEST = b"columns"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One sidecar, its columns as views into the file."""

    offsets: Int64Array
    lengths: Int64Array
    labels: Int64Array
    paths: Any
    """(rows,) Arrow strings."""
    restarts: Any
    """(rows,) Arrow lists of uint32, null for plain files."""

    def restart_offsets(self, row: int) -> NDArray[np.uint32] | None:
        """(num_intervals,) uint32, or None for a plain file."""
        cell = self.restarts[row]
        return cell.values.to_numpy(zero_copy_only=True) if cell.is_valid else None


def index_path(shard: str) -> str:
    """The sidecar's path for a shard's."""
    return shard.removesuffix(".parquet") + INDEX_SUFFIX


def shard_stamp(size: int, tail: bytes) -> bytes:
    """What identifies a shard: its size, and the checksum of the last bytes that its footer takes.

    Args: tail: the end of the file, at least the footer with its length and signature.
    """
    footer = tail[-8 - int.from_bytes(tail[-8:-4], "little") :]
    return f"{size} {hashlib.sha256(footer).hexdigest()}".encode()


def write_index(
    shard: Path,
    destination: Path,
    images: Sequence[bytes],
    labels: Sequence[int],
    paths: Sequence[str],
    restarts: Sequence[NDArray[np.uint32] | None],
) -> bool:
    """Write the sidecar of a shard that was just written without compression or dictionaries.

    Every address is found by the bytes themselves, and compared. Returns: False, and no file, if they are not found.
    """
    with shard.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offsets = _find(content, images)
        if offsets is None:
            return False
        footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
        stamp = shard_stamp(len(content), content[-footer_bytes:])
    table = pa.Table.from_arrays(
        [
            pa.array(offsets, type=pa.int64()),
            pa.array([len(data) for data in images], type=pa.int64()),
            pa.array(labels, type=pa.int64()),
            pa.array(paths, type=pa.string()),
            pa.array(restarts, type=pa.large_list(pa.uint32())),
        ],
        schema=_SCHEMA,
    )
    write_arrow(destination, table.replace_schema_metadata({_STAMP: stamp, _DIGEST: _digest(table)}))
    return True


def _find(content: mmap.mmap, images: Sequence[bytes]) -> list[int] | None:
    """Where the images' bytes begin: in their order, each after its length, with only page headers between them."""
    offsets, at = [], LENGTH_BYTES  # behind the signature
    for data in images:
        if not data:
            offsets.append(at)  # nothing to read
            continue
        found = content.find(struct.pack("<I", len(data)) + data[:64], at)
        at = found + LENGTH_BYTES
        if found < 0 or content[at : at + len(data)] != data:
            return None
        offsets.append(at)
        at += len(data)
    return offsets


def index_is_fresh(storage: Storage, path: str, stamp: bytes, num_rows: int) -> bool:
    """Whether a sidecar can be read and belongs to the shard of this stamp."""
    try:
        table = read_arrow(storage, path)
    except (DataError, pa.ArrowException, OSError):
        return False
    return (
        (table.schema.metadata or {}).get(_STAMP) == stamp
        and table.schema.remove_metadata().equals(_SCHEMA)
        and table.num_rows == num_rows
        and _is_as_written(table)
    )


def _is_as_written(table: pa.Table) -> bool:
    """Whether the columns are those that were written; sidecars of earlier versions do not tell."""
    digest = (table.schema.metadata or {}).get(_DIGEST)
    return digest is None or _digest(table) == digest


def _digest(table: pa.Table) -> bytes:
    """SHA-256 of the values of all columns, whatever Arrow keeps beside them."""
    digest = hashlib.sha256()
    for column in table.columns:
        values = column.combine_chunks()
        digest.update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
        if pa.types.is_string(values.type):
            lengths, parts = pc.binary_length(values), b"".join(values.cast(pa.binary()).drop_null().to_pylist())
        elif pa.types.is_large_list(values.type):
            lengths, parts = pc.list_value_length(values), values.flatten().to_numpy().tobytes()
        else:
            lengths, parts = values, b""
        digest.update(lengths.fill_null(0).to_numpy().astype("<i8").tobytes())
        digest.update(parts)
    return digest.hexdigest().encode()


@lru_cache(maxsize=4096)
def load_index(storage: Storage, path: str, stamp: bytes) -> ShardIndex | None:
    """A sidecar that index_is_fresh has approved, kept per process; None if it has gone, or was damaged, since.

    Raises: DataError if it belongs to another shard now.
    """
    try:
        table = read_arrow(storage, path)
    except (DataError, pa.ArrowException, OSError):
        return None
    if (table.schema.metadata or {}).get(_STAMP) != stamp:
        raise DataError(f"{storage.shown(path)} has changed since it was opened: were the shards written again?")
    if not _is_as_written(table):
        return None
    offset, length, label, paths, restarts = (column.combine_chunks() for column in table.columns)
    return ShardIndex(offset.to_numpy(), length.to_numpy(), label.to_numpy(), paths, restarts)


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write an Arrow file as one batch.   Raises: OSError."""
    with (
        writing(path) as temporary,
        pa.OSFile(os.fsencode(temporary), "wb") as sink,
        pa_ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table.combine_chunks())


def read_arrow(storage: Storage, path: str) -> pa.Table:
    """An Arrow file: mapped into memory if it is local, read whole if not.   Raises: DataError, pa.ArrowException."""
    source = pa.memory_map(os.fsencode(path)) if storage.is_local else pa.BufferReader(storage.open(path).readall())
    return pa_ipc.open_file(source).read_all()
