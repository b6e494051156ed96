"""What files contain, as digests: of local files the SHA-256 of their bytes, of remote ones the store's own tag.

A local file is read once: its digest is kept, in the user's cache, with everything that changes when the file does
(size, times, inode), and counts as long as that is the same. Names and times alone would not do: a file of the same
size may be copied over another one with its time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from mixmae.data.account import escaped
from mixmae.data.source import DataError
from mixmae.data.sources.shard_index import read_arrow, write_arrow
from mixmae.data.sources.storage import Storage, StoredFile
from mixmae.machine import cache_folders, usable_cores

_WORTH_A_NOTE_BYTES = 4_000_000_000
"""Reading more than this takes seconds to minutes: it is said."""
_SETTLED_NS = 2_000_000_000
"""A file may change again within one tick of its clock: a digest is kept only of files that are older than this."""


def content_digests(storage: Storage, root: str, files: Sequence[StoredFile]) -> list[str]:
    """A digest of the contents of each file; empty for files that cannot be read.

    Args: root: identifies the collection among those whose digests are kept.
    """
    if not storage.is_local:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(storage.version, files))
    kept = _load(root)
    missing = [file for file in files if (file.path, file.stamp) not in kept]
    total = sum(file.num_bytes for file in missing)
    if total > _WORTH_A_NOTE_BYTES:
        print(f"note: reading {total / 1e9:.0f} GB in {escaped(root)} once, to know its contents again", flush=True)
    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the GIL
        fresh = dict(zip(((file.path, file.stamp) for file in missing), pool.map(_digest_of, missing), strict=True))
    found = {key: kept.get(key) or fresh[key] for key in ((file.path, file.stamp) for file in files)}
    if missing:
        _save(root, found)
    return [found[file.path, file.stamp] for file in files]


def changed(storage: Storage, file: StoredFile, contents: str) -> str:
    """What is wrong with a local file that was opened, or "" if it is still the same.

    Args:   contents: its digest, if that is known: a file that was only touched is still the same.
    Raises: DataError if it is gone.
    """
    if not storage.is_local:
        return ""
    now = storage.identity(file.path)
    if now[:2] == file.stamp[:2] or _holds(file.path, now, contents):
        return ""
    return f"{escaped(file.relative)} has changed since it was opened"


@lru_cache(maxsize=4096)
def _holds(path: str, stamp: tuple[int, ...], digest: str) -> bool:
    """Whether a file that has this stamp now holds these contents; read once."""
    try:
        return bool(digest) and file_digest(path) == digest
    except OSError:
        return False


def file_digest(path: str) -> str:
    """64 hex digits of SHA-256 over a local file.   Raises: OSError."""
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(file: StoredFile) -> str:
    try:
        return file_digest(file.path)
    except OSError:
        return ""


_Key = tuple[str, tuple[int, int, int, int]]


def _kept_in(root: str) -> list[Path]:
    name = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:32]
    return [folder / "contents" / f"{name}.arrow" for folder in cache_folders()]


def _load(root: str) -> dict[_Key, str]:
    for path in _kept_in(root):
        with contextlib.suppress(OSError, pa.ArrowException, DataError, ValueError):
            columns = [column.to_pylist() for column in read_arrow(Storage(), str(path)).columns]
            paths, size, modified, changed, inode, digests = columns
            stamps = zip(size, modified, changed, inode, strict=True)
            return dict(zip(zip(map(os.fsdecode, paths), stamps, strict=True), digests, strict=True))
    return {}


def _save(root: str, digests: dict[_Key, str]) -> None:
    now = time.time_ns()
    settled = [(key, digest) for key, digest in digests.items() if digest and key[1][2] < now - _SETTLED_NS]
    stamps = [[key[1][part] for key, _ in settled] for part in range(4)]
    table = pa.table(
        {
            "path": pa.array([os.fsencode(key[0]) for key, _ in settled], pa.large_binary()),
            **{
                name: pa.array(values, pa.int64())
                for name, values in zip(("size", "modified", "changed", "inode"), stamps, strict=True)
            },
            "digest": pa.array([digest for _, digest in settled], pa.string()),
        }
    )
    for path in _kept_in(root):
        with contextlib.suppress(OSError):
            write_arrow(path, table)
            return
