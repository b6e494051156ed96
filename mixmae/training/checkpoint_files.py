"""The files of a run's checkpoints, looked at without torch: which are there, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """What was found in a checkpoint's folder."""

    path: Path
    step: int | None
    """Steps that were trained; None if that cannot be read."""
    num_bytes: int
    problem: str
    """What is damaged, in words; empty: nothing that could be seen."""
    checked: str
    """What was looked at: "bytes", "sizes" or, in a store, "names"."""
    has_digests: bool
    """Whether state.json has SHA-256 digests of the files; those of earlier versions had none."""


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first."""
    return sorted((path for path in run.glob("checkpoints/step_*") if path.is_dir()), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The finished steps that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def sha256_of(file: Path) -> str:
    """The digest of a file's bytes."""
    with file.open("rb", buffering=0) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def state_sha256(content: Mapping[str, Any]) -> str:
    """The digest of a state.json, of all that it holds but its own digest."""
    stored = json.loads(json.dumps({name: value for name, value in content.items() if name != "state_sha256"}))
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()  # of what is read back


def look_at(checkpoint: Path, *, verify: bool) -> CheckpointFiles:
    """Look whether a checkpoint's files are whole.

    Args: verify: read every byte and compare digests, where there are some; else lengths alone.
    Raises: OSError if the folder cannot be read.
    """
    files = [file for file in checkpoint.iterdir() if file.is_file()]
    problem, step, digests = "", None, None
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        step, digests = int(state["position"]["step"]), state.get("files")
        if state.get("state_sha256", state_sha256(state)) != state_sha256(state):
            problem = "state.json is not what was written"
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        problem = f"state.json is missing or damaged ({type(error).__name__})"
    expected = digests if isinstance(digests, Mapping) else dict.fromkeys(["model.safetensors", "optimizer.pt"])
    for name, digest in expected.items():
        problem = problem or _problem_of(checkpoint / name, digest if verify else None)
    return CheckpointFiles(
        path=checkpoint,
        step=step,
        num_bytes=sum(file.stat().st_size for file in files),
        problem=problem,
        checked="bytes" if verify and digests else "sizes",
        has_digests=bool(digests),
    )


def _problem_of(file: Path, digest: str | None) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    if digest is not None:
        return "" if sha256_of(file) == digest else f"{file.name} is not what was written"
    is_whole = {".safetensors": _is_whole_safetensors, ".pt": zipfile.is_zipfile}.get(file.suffix)
    return f"{file.name} is cut short" if is_whole and not is_whole(file) else ""


def _is_whole_safetensors(file: Path) -> bool:
    """Whether a file is as long as its header says: 8 bytes with its length, JSON with the tensors' places, tensors."""
    with file.open("rb") as content:
        try:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(min(length, file.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            return False
    return file.stat().st_size == 8 + length + max(ends, default=0)
