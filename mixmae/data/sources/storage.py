"""Where files lie: local paths, and the URIs of pyarrow's filesystems (s3://, gs://, ...), behind a few functions.

A remote path is what pyarrow's filesystem takes, without the scheme (bucket/key): in URIs of single files every space
and percent sign would have to be quoted. Messages show scheme://bucket/key, never a URI's credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pa_fs

from mixmae.data.account import Note, Tally, escaped
from mixmae.data.chunks import Int64Array
from mixmae.data.source import DataError
from mixmae.stores import connect, is_uri, without_secrets

INDEX_SUFFIX = ".index"
"""Of the files that we keep beside tars and shards."""
_GAP_BYTES = 256 * 1024
"""Remote ranges closer than this are fetched in one request: about what a store sends while a request waits."""
_REQUEST_BYTES = 16 * 1024 * 1024
_REMOTE_READERS = 16


@dataclass(frozen=True)
class StoredFile:
    """One file of a listing."""

    path: str
    """Inside its storage; absolute for local files."""
    relative: str
    """Below the folder that was listed, with forward slashes."""
    num_bytes: int
    modified_ns: int
    problem: str = ""
    """Why it cannot be read, if that is known."""
    changed_ns: int = 0
    """Of a local file, when it or its name, owner or times were last changed: unlike modified_ns, nobody can set it."""
    inode: int = 0

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """As long as this is the same, so are the contents."""
        return self.num_bytes, self.modified_ns, self.changed_ns, self.inode


@dataclass(frozen=True)
class Storage:
    """A filesystem: the local one, or the one that a URI names. Small and picklable; connections are per process."""

    uri: str = ""
    """The URI that the user gave, with its endpoint and credentials if it has any; empty: local files."""

    @property
    def is_local(self) -> bool:
        return not self.uri

    @property
    def filesystem(self) -> Any:
        """pyarrow's filesystem.   Raises: DataError if the URI is none that pyarrow knows."""
        return _connect(self.uri)[0] if self.uri else _LOCAL

    def shown(self, path: str) -> str:
        """The path as a message names it."""
        return escaped(path if self.is_local else f"{urlsplit(self.uri).scheme}://{path}")

    def kind(self, path: str) -> str:
        """ "file", "folder" or "" if nothing is there.   Raises: DataError if the store does not answer."""
        if self.is_local:
            return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else ""
        info = self._ask(path, lambda: self.filesystem.get_file_info(path))
        return {pa_fs.FileType.Directory: "folder", pa_fs.FileType.File: "file"}.get(info.type, "")

    def file(self, path: str, relative: str = "") -> StoredFile:
        """A single file's entry; if it is missing, `problem` is set."""
        relative = relative or path.rsplit("/", 1)[-1]
        if self.is_local:
            return _local_file(path, relative)
        info = self._ask(path, lambda: self.filesystem.get_file_info(path))
        missing = "" if info.type == pa_fs.FileType.File else "no such file"
        return StoredFile(path, relative, info.size or 0, info.mtime_ns or 0, missing)

    def list_files(self, folder: str, suffixes: Collection[str]) -> tuple[list[StoredFile], tuple[Note, ...]]:
        """The files below a folder with one of the suffixes, by name, through links, and notes of what else is there.

        Hidden files are left out.
        """
        found, tally, folders = [], Tally(), []
        for relative, file in self._walk(folder):
            suffix = suffix_of(relative)
            hidden = is_hidden(relative)
            if file is None:
                folders += [] if hidden else [relative]
            elif suffix in suffixes:
                if hidden and suffix == INDEX_SUFFIX:
                    continue  # of a tar, kept by tars.py
                if hidden:
                    tally.add("hidden files are left out", relative, "rename those that you need")
                else:
                    found.append(file())
            elif not hidden:
                tally.add(*unknown_kind(relative))
        for relative in _outermost(folders, (file.relative for file in found)):
            tally.add("folders hold no image", relative)
        return sorted(found, key=lambda file: file.relative), tally.notes

    def _walk(self, folder: str) -> Iterator[tuple[str, Callable[[], StoredFile] | None]]:
        """Every file below a folder, its relative path and how to get its entry; of local folders the path and None."""
        if self.is_local:
            for path, relative in _local_paths(folder):
                yield relative, partial(_local_file, path, relative) if path else None
            return
        selector = pa_fs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in self._ask(folder, lambda: self.filesystem.get_file_info(selector)):
            relative = info.path.removeprefix(folder).lstrip("/")
            if info.type == pa_fs.FileType.File:
                empty = "" if info.size else "empty"
                yield relative, partial(StoredFile, info.path, relative, info.size or 0, info.mtime_ns or 0, empty)

    def open(self, path: str) -> pa.NativeFile:
        """A file for random access.   Raises: DataError."""
        stored = os.fsencode(path) if self.is_local else path  # any bytes may be a local name
        return self._ask(path, lambda: self.filesystem.open_input_file(stored))

    def identity(self, path: str) -> tuple[int, ...]:
        """What distinguishes a local file from a later one of the same name; () for a remote one: it is not checked.

        Raises: DataError if it is gone.
        """
        return _identity(path) if self.is_local else ()

    def version(self, file: StoredFile) -> str:
        """What identifies the contents of a remote file: the store's tag if it has one, else size and time.

        Raises: DataError.
        """
        with self.open(file.path) as stream:
            facts = self._ask(file.path, stream.metadata) or {}
        tag = facts.get(b"ETag") or facts.get("ETag") or b""
        return f"{file.num_bytes} {tag!r}" if tag else f"{file.num_bytes} {file.modified_ns}"

    def read_file(self, path: str) -> bytes:
        """A whole file.   Raises: OSError."""
        if self.is_local:
            with open(path, "rb") as stream:
                return stream.read()
        with self.filesystem.open_input_file(path) as stream:
            return bytes(stream.readall())

    def read_files(self, paths: Sequence[str]) -> list[bytes | OSError]:
        """The bytes of whole files, or the error of each; remote files are read at the same time."""

        def one(path: str) -> bytes | OSError:
            try:
                return self.read_file(path)
            except OSError as error:
                return error

        return [one(path) for path in paths] if self.is_local else list(_pool_of(os.getpid()).map(one, paths))

    def read_ranges(self, path: str, starts: Int64Array, lengths: Int64Array) -> list[bytes]:
        """Byte ranges of one file. Of a local file exactly these are read; near ranges of a remote file in one request.

        Raises: DataError if the file is gone or shorter than it was.
        """
        if self.is_local:
            handle = _local_handle(path, *_identity(path))
            parts = [os.pread(handle.number, length, start) for start, length in zip(starts, lengths, strict=True)]
        else:
            parts = self._read_remote_ranges(path, starts, lengths)
        if any(len(part) != length for part, length in zip(parts, lengths, strict=True)):
            raise DataError(f"{self.shown(path)} is shorter than when it was opened: was it overwritten?")
        return parts

    def _read_remote_ranges(self, path: str, starts: Int64Array, lengths: Int64Array) -> list[bytes]:
        order = np.argsort(starts, kind="stable")
        requests: list[list[int]] = []  # the ranges that one request fetches, by their index
        begin = end = 0
        for index in order:
            start, stop = int(starts[index]), int(starts[index] + lengths[index])
            if requests and start - end <= _GAP_BYTES and stop - begin <= _REQUEST_BYTES:
                requests[-1].append(int(index))
                end = max(end, stop)
            else:
                requests.append([int(index)])
                begin, end = start, stop
        handle = _remote_handle(self, path)
        parts = [b""] * len(starts)

        def fetch(indices: list[int]) -> None:
            first = int(starts[indices[0]])
            last = max(int(starts[index] + lengths[index]) for index in indices)
            data = self._ask(path, lambda: handle.read_at(last - first, first))
            for index in indices:
                at = int(starts[index]) - first
                parts[index] = bytes(data[at : at + int(lengths[index])])

        for _ in _pool_of(os.getpid()).map(fetch, requests):
            pass
        return parts

    def _ask(self, path: str, question: Any) -> Any:
        try:
            return question()
        except (pa.ArrowException, OSError) as error:
            remedy = "is it there, and may you read it?"
            if not self.is_local:
                remedy = "check the address, the credentials and the endpoint"
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{self.shown(path)} cannot be read ({reason}): {remedy}") from error


def locate(location: str | Path) -> tuple[Storage, str]:
    """The storage of a path or URI and the path inside it.

    Args: location: a local path (~ is expanded), file://, s3://bucket/prefix?endpoint_override=HOST&scheme=http, gs://
    Raises: DataError if the URI is none that pyarrow knows.
    """
    text = str(location)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if not is_uri(text):
        return Storage(), str(Path(text).expanduser().absolute())
    return Storage(text), _connect(text)[1]


def writable_folder(location: str | Path) -> Path:
    """A local folder to write to, made if it is missing.   Raises: DataError if it cannot be written to."""
    if is_uri(str(location)):
        raise DataError(f"cannot write to {plain_place(str(location))}: the output must be a local folder")
    folder = Path(location).expanduser().resolve()
    if escaped(str(folder)) != str(folder):
        raise DataError(f"the name of {escaped(str(folder))} is not UTF-8: choose another output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}): choose another output folder") from error
    return folder


def plain_place(location: str) -> str:
    """A local path as an absolute one, a URI without its user, password and query: what may be logged."""
    if not is_uri(location):
        return escaped(str(Path(location).expanduser().absolute()))
    return without_secrets(location)


def is_hidden(relative: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden, or is one of those that macOS stores beside files."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in relative.split("/"))


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _connect(uri: str) -> tuple[Any, str]:
    try:
        return connect(uri)
    except ValueError as error:
        raise DataError(str(error)) from error


_LOCAL = pa_fs.LocalFileSystem()


class _Handle:
    """An open local file; closed when the cache drops it and nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # Without it the kernel reads ahead after every image: 1.5 times the bytes that are used.
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _identity(path: str) -> tuple[int, int, int, int]:
    """A file's stamp now: a handle of an earlier file of this name reads the old bytes."""
    try:
        return _stamp(os.stat(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read any more ({error}): was it moved or overwritten?") from error


@lru_cache(maxsize=256)
def _local_handle(path: str, *identity: int) -> _Handle:
    try:
        return _Handle(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read any more ({error}): was it moved or overwritten?") from error


@lru_cache(maxsize=256)
def _remote_handle(storage: Storage, path: str) -> pa.NativeFile:
    return storage.open(path)  # read_at takes no lock and no position: threads share it


@lru_cache(maxsize=1)
def _pool_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="remote")


def _local_paths(root: str) -> Iterator[tuple[str, str]]:
    """The absolute and the relative path of every file below a folder, and "" and the relative path of every folder."""
    seen = {os.path.realpath(root)}
    for parent, folders, files in os.walk(root, followlinks=True):
        inside = os.path.relpath(parent, root).replace(os.sep, "/") + "/" if parent != root else ""
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen:  # a link may lead back up
                seen.add(real)
                kept.append(name)
                yield "", inside + name
        folders[:] = kept
        for name in sorted(files):
            yield os.path.join(parent, name), inside + name


def _outermost(folders: Sequence[str], files: Iterable[str]) -> Iterator[str]:
    """The folders that hold none of the files, without those inside of others."""
    used = {""}
    for file in files:
        while (file := file.rpartition("/")[0]) not in used:
            used.add(file)
    for folder in folders:
        if folder not in used and folder.rpartition("/")[0] in used:
            yield folder


def _local_file(path: str, relative: str) -> StoredFile:
    try:
        stat = os.stat(path)
    except OSError as error:
        return StoredFile(path, relative, 0, 0, str(error.strerror))
    problem = "" if stat.st_size else "empty"
    if not problem and not os.access(path, os.R_OK):
        problem = "no permission"
    size, modified, changed, inode = _stamp(stat)
    return StoredFile(path, relative, size, modified, problem, changed, inode)


def _stamp(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino % 2**63  # some systems use all 64 bits


_REMEDIES = {
    "convert them to JPEG, or install pillow-heif (pip install 'mixmae[heic]'), which reads them": (".heic", ".heif"),
    "convert them to JPEG or PNG": (".jxl", ".jp2", ".svg", ".psd", ".ai", ".eps", ".pdf", ".ico", ".tga", ".exr"),
    "export them as JPEG or TIFF": (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    "unpack them": (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"),
    "take frames out of them": (".mp4", ".mov", ".avi", ".mkv", ".webm"),
}
_REMEDY_BY_SUFFIX = {suffix: remedy for remedy, suffixes in _REMEDIES.items() for suffix in suffixes}


def unknown_kind(relative: str) -> tuple[str, str, str]:
    """The kind of a file that is not read, its name and the remedy."""
    suffix = suffix_of(relative)
    if not re.fullmatch(r"\.[a-z][a-z0-9_]{0,11}", suffix):  # photo_1, or a date with dots
        return "files without a known suffix are left out", relative, "if they are images, let them end in .jpg or .png"
    remedy = _REMEDY_BY_SUFFIX.get(suffix, "if they are images, let them end in .jpg or .png")
    return f"files ending in {suffix} are left out", relative, remedy
