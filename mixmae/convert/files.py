"""Opening files of weights, whatever their suffix; what is no such file is called by its name."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from mixmae.training.checkpoint import AVERAGE_FILE, MODEL_FILE

INDEX_SUFFIX = ".index.json"
"""End of the name of Hugging Face's list of the files that weights are spread over."""

FOLDER_FILES = (
    MODEL_FILE,
    "encoder.safetensors",
    "classifier.safetensors",
    "pytorch_model.bin",
    MODEL_FILE + INDEX_SUFFIX,
    "pytorch_model.bin" + INDEX_SUFFIX,
)
"""What is read of a folder: the first of these that is there, else its only file with one of SUFFIXES."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

SAFE_GLOBALS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
"""Classes allowed in checkpoints: the arguments in official ones; the config in Microsoft's, read as a dict."""

_AGAIN = "download or copy it again"
_HEAD_BYTES = 512
_MAX_HEADER_BYTES = 2**30
_SIGNATURES = (
    (rb"version https://git-lfs", "a git-lfs pointer, which stands for the weights: fetch them by `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", "a web page (of an error or a login?), not weights: "
     "open its address in a browser, and download the file itself"),
    (rb"\x93NUMPY", "a numpy array: save tensors by name, as a safetensors file"),
    (rb"\x89HDF\r\n", "an HDF5 file (of Keras?): save tensors by name, as a safetensors file"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|\x28\xb5\x2f\xfd", "compressed: unpack it, and give the file in it"),
    (rb"[\t\r\n -~]+\Z", "a text file, not weights: check the address that it is from, and " + _AGAIN),
)  # fmt: skip
"""Beginnings of files that are taken for weights, and what they are."""


def find_file(path: Path) -> Path:
    """Find the file of weights that a path leads to.   Raises: ValueError, FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    hint = f": name one of its files, such as {files[0]}" if files else ""
    checkpoints = sorted(path.glob("**/step_*/" + MODEL_FILE))
    hint = f": choose one of its checkpoints, such as {checkpoints[-1].parent}" if checkpoints else hint
    raise ValueError(f"{path} is a folder without {MODEL_FILE}{hint}")


def read_content(file: Path) -> Any:
    """Read all that a file holds, without running code from it.

    Args:
        file: of safetensors or of torch.save; the index of files that weights are spread over; a run's model, beside
            which the running average of its weights may be.
    Returns: tensors by name, on the CPU, or whatever else a torch file holds.
    Raises: ValueError if it is no such file, is damaged, or contains more than tensors and plain values.
    """
    if file.name.endswith(INDEX_SUFFIX):
        return _read_parts(file)
    _refuse_others(file)
    content = _load_safetensors(file) if is_safetensors(file) else _load_torch(file)
    average = file.with_name(AVERAGE_FILE)
    if file.name == MODEL_FILE and average.is_file():
        return {"model": content, "average": content | _load_torch(average)["averages"]}
    return content


def is_safetensors(file: Path) -> bool:
    """Whether a file is one of safetensors, by its first bytes, or a damaged one, by its suffix."""
    head = _head(file)
    return _starts_as_safetensors(head) or (
        file.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))  # what torch.save writes
    )


def _starts_as_safetensors(head: bytes) -> bool:
    # The length of the header, which has any last byte, also those that other files begin with, and then the header.
    return int.from_bytes(head[:8], "little") < _MAX_HEADER_BYTES and head[8:9] == b"{"


def _load_safetensors(file: Path) -> Any:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file, but damaged or cut short ({error}): {_AGAIN}"
        ) from error


def _load_torch(file: Path) -> Any:
    try:
        # As an open file: of a path, torch takes the suffix at its word.
        with torch.serialization.safe_globals(SAFE_GLOBALS), file.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes raise depends on where the damage is
        refused = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error))
        if refused is not None:
            raise ValueError(
                f"{file} contains more than tensors and plain values ({refused[1]}), which could run code: ask its "
                "author for a safetensors file, or for the weights alone"
            ) from error
        raise ValueError(f"{file} was not read: it is damaged or cut short, or not of torch: {_AGAIN}") from error


def _read_parts(index: Path) -> dict[str, Any]:
    """Read weights that are spread over several files.   Args: index: JSON, from names of tensors to those of files."""
    try:
        parts = [
            index.parent / name
            for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if not _head(index).startswith(b"{"):
            _refuse_others(index)
        raise ValueError(f"{index} does not say which files hold the weights ({error!r}): {_AGAIN}") from error
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise ValueError(
            f"{index} names {len(parts)} files, of which {', '.join(absent[:3])} {'is' if len(absent) == 1 else 'are'} "
            "not there: download all of them"
        )
    content: dict[str, Any] = {}
    for part in parts:
        held = read_content(part)
        content |= held if isinstance(held, Mapping) else {}
    return content


def _refuse_others(file: Path) -> None:
    """Raise ValueError with its name if a file is something else than weights."""
    head = _head(file)
    if not head:
        raise ValueError(f"{file} is empty: {_AGAIN}")
    if _starts_as_safetensors(head):
        return
    for pattern, what in _SIGNATURES:
        if re.match(pattern, head, re.IGNORECASE):
            raise ValueError(f"{file} is {what}")
    if head.startswith(b"PK") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = [Path(name).name for name in archive.namelist()]
        if "constants.pkl" in names:
            raise ValueError(f"{file} is a TorchScript program: save the state_dict() of its model")
        if "data.pkl" not in names:
            some = ", ".join(names[:3]) or "nothing"
            raise ValueError(
                f"{file} is a zip archive (of {some}), not weights: unpack it, and give the file of weights in it"
            )


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_HEAD_BYTES)
