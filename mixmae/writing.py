"""Files and folders that others read are written aside and renamed when whole: nobody ever sees a half-written one."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary name beside `target` to write a file or a folder to, and rename it when that is done.

    Args:
        target: where the file or folder shall be; missing parent folders are made. The temporary name has its suffix.
        overwrite: replace what is there.
    Raises: ValueError if the target is there and overwrite is not set. After any error the temporary file or folder is
        removed, and the target is as it was.
    """
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: choose another place, or allow to overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial.{os.getpid()}.{target.name}")
    _remove(partial)
    try:
        yield partial
        if target.is_dir() and partial.is_dir():  # a folder cannot be replaced at once, a file can
            aside = _aside(target)
            _remove(aside)
            target.replace(aside)
            partial.replace(target)
            _remove(aside)
        else:
            partial.replace(target)
    finally:
        _remove(partial)


@contextmanager
def writing_table(target: Path) -> Iterator[Any]:
    """Give the writer of a CSV file, which appears when it is whole; names of files may hold any bytes."""
    with (
        writing(target) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield csv.writer(file)


def recover(target: Path) -> Path:
    """Put back a folder that was being replaced when its writer died; returns the target."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.replace(target)
    return target


def _aside(target: Path) -> Path:
    return target.with_name(f".previous.{target.name}")


def flush(path: Path) -> None:
    """Have what was written to a file, or to the list of names of a folder, on the disk.   Raises: OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Write a text file as `writing` does."""
    with writing(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Any, *, indent: int = 2) -> None:
    """Write JSON as `writing` does, with a newline at the end."""
    write_text(target, json.dumps(content, indent=indent) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
