"""How far a run is, in files of its folder, for who cannot see its terminal (pipelines/status.py).

progress.json     the newest progress record, with time, length and time left
restarts.jsonl    one line for each restart of the workers: time, step of the newest checkpoint, reason
starts.jsonl      one line for each start of workers: time, step that they train from, how many they are
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmae.training.checkpoint_files import checkpoints_of, step_of
from mixmae.writing import write_json

PROGRESS_FILE = "progress.json"
RESTARTS_FILE = "restarts.jsonl"
STARTS_FILE = "starts.jsonl"


class ProgressFile:
    """Writes these files from the messages of a run's workers; its clock starts at the first record after a start."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._folder, self._total = folder, total_steps
        self._first: tuple[int, float] | None = None
        self._num_workers: int | None = None
        """Of a start that has not been written down."""

    def receive(self, kind: str, content: Any) -> None:
        """Keep what a message of mixmae.training.mailbox says, if it is of the kinds that count.   Raises: OSError."""
        if kind == "progress":
            self._record(content)
        elif kind == "workers":
            self._num_workers = content["count"]
        elif kind == "started":
            self._first = None
            if self._num_workers is not None:
                self._add(STARTS_FILE, step=content, workers=self._num_workers)
                self._num_workers = None
        elif kind == "restart":
            step = next(map(step_of, checkpoints_of(self._folder)), 0)
            self._add(RESTARTS_FILE, step=step, reason=content)

    def _add(self, name: str, **content: Any) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **content}) + "\n")

    def _record(self, record: Mapping[str, float]) -> None:
        step, now = int(record["step"]), time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        each_s = (now - first_time) / (step - first_step) if step > first_step else None
        eta_s = None if each_s is None else round(each_s * (self._total - step), 1)
        content = {**record, "step": step, "total_steps": self._total, "eta_s": eta_s, "time": time.time()}
        write_json(self._folder / PROGRESS_FILE, content)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The content of progress.json; None if a run has made none yet, or it is damaged."""
    try:
        content: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        return content
    except (FileNotFoundError, ValueError):
        return None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line, without those that are not whole; none if it is missing."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # torn by a full disk, or being written
            continue
    return found
