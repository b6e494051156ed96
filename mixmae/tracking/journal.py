"""The journal of a run: all that it logs goes to its output folder first, and from there to MLflow (sender.py).

metrics.jsonl    one JSON object per line, each with its `time` in ms since 1970, and one of
                 run               what create_run needs; always the first line
                 step, metrics     points of curves
                 step, image, key  a picture's file in the output, for the series `key`
                 file, title       a file of the output, to be kept among the run's artifacts
                 status, tags      RUNNING where the run begins to be continued, else how it ended
metrics.sent     how many bytes of it MLflow has or has refused, and which run they are in
metrics.refused.jsonl   entries that MLflow does not take, each with the `reason`: they are not tried again

Rank 0 writes while it trains, the driver before and after. A step that is trained again after a restart is in the
journal again; whoever reads it with a Reader sees the first point of each curve at each step, and no other. Nothing
here imports mlflow, uses the network or waits for another process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mixmae.tracking.store import RunRef
from mixmae.writing import write_json

JOURNAL = "metrics.jsonl"
SENT = "metrics.sent"
REFUSED = "metrics.refused.jsonl"
MAX_WAITING = 100_000
"""Lines that are kept in memory while the folder cannot be written; beyond them the oldest are dropped."""

Entry = dict[str, Any]


class Journal:
    """Adds lines to the journal of a run. It never raises: what cannot be written now is written with the next line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._is_told = False

    def add(self, **entry: Any) -> None:
        """Write one line; it outlives this process, but a power cut only after `sync`."""
        line = to_line({"time": now_ms(), **entry})
        with self._lock:
            self._waiting = [*self._waiting[-MAX_WAITING:], line] if self._waiting else [line]
            try:
                with self.path.open("a+b", buffering=0) as file:
                    _drop_torn_line(file)
                    data = b"".join(self._waiting)
                    if file.write(data) == len(data):  # fewer where the disk is full: a torn line, for next time
                        self._waiting = []
                        self._is_told = False
            except OSError as error:
                if not self._is_told:
                    self._is_told = True
                    warnings.warn(f"{self.path} cannot be written ({error}): points wait in memory", stacklevel=2)

    def add_points(self, metrics: Mapping[str, float], step: int) -> None:
        """Write points of curves at a step."""
        self.add(step=step, metrics={name: float(value) for name, value in metrics.items()})

    def sync(self) -> None:
        """See that a power cut cannot take what was added."""
        with contextlib.suppress(OSError), self.path.open("ab") as file:  # add has told, or will
            os.fsync(file.fileno())


class Reader:
    """Reads a journal from its beginning, and goes on where it stopped when there is more."""

    def __init__(self, folder: Path, limit: Callable[[], float] = lambda: math.inf) -> None:
        """Args: limit: up to which byte it reads now."""
        self._path, self._limit = folder / JOURNAL, limit
        self._offset = 0
        self.last_steps: dict[str, int] = {}
        """The last step of each curve and, under "image:" and its key, of each series of pictures."""

    def read(self, max_entries: int | None = None) -> list[tuple[Entry, int]]:
        """The next entries without points that were there before, each with the offset of its line's end."""
        found: list[tuple[Entry, int]] = []
        with contextlib.suppress(OSError), self._path.open("rb") as file:  # not there yet, or not now
            file.seek(self._offset)
            limit = self._limit()
            for line in file:
                if not line.endswith(b"\n") or (max_entries is not None and len(found) >= max_entries):
                    break  # the first: it is being written, or torn
                if self._offset + len(line) > limit:
                    break
                self._offset += len(line)
                if entry := self._without_repeats(line):
                    found.append((entry, self._offset))
        return found

    def _without_repeats(self, line: bytes) -> Entry | None:
        try:
            entry = json.loads(line)
            if "metrics" in entry:
                step = entry["step"]
                new = {name: value for name, value in entry["metrics"].items() if self._is_new(name, step)}
                return {**entry, "metrics": new} if new else None
            if "image" in entry:
                return entry if self._is_new(f"image:{entry['key']}", entry["step"]) else None
        except (ValueError, TypeError, KeyError, AttributeError):  # a damaged line costs its own points alone
            return None
        return entry

    def _is_new(self, name: str, step: int) -> bool:
        """Whether a curve goes on at this step; a run trains its steps in order, so the last one is all to remember."""
        if step <= self.last_steps.get(name, -1):
            return False
        self.last_steps[name] = step
        return True


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What metrics.sent holds."""

    uri: str = ""
    """MLflow's store; empty: nobody has tried to send."""
    run: RunRef | None = None
    """The run there; None until there is one."""
    offset: int = 0
    """Bytes of the journal that the run has."""

    def write(self, folder: Path) -> None:
        """Replace the file."""
        write_json(folder / SENT, asdict(self))


def read_sent(folder: Path) -> Sent:
    """metrics.sent; a missing or damaged one is that of a journal nothing of which was sent: it may be sent again."""
    try:
        content = json.loads((folder / SENT).read_text(encoding="utf-8"))
        run = content["run"]
        return Sent(uri=content["uri"], run=RunRef(**run) if run else None, offset=content["offset"])
    except (OSError, ValueError, TypeError, KeyError):
        return Sent()


def run_of(folder: Path) -> RunRef | None:
    """The MLflow run that a journal is sent to, or None as long as there is none."""
    return read_sent(folder).run


def unsent(folder: Path) -> list[Entry]:
    """The entries of a run's journal that MLflow does not have."""
    offset = read_sent(folder).offset
    return [entry for entry, end in Reader(folder).read() if end > offset]


def backlog(folder: Path) -> int:
    """How many points of a run's curves are not in MLflow yet.   Args: folder: the run's output."""
    return sum(len(entry.get("metrics", ())) for entry in unsent(folder))


def refused(folder: Path) -> list[Entry]:
    """What MLflow does not take of a run, with the `reason`."""
    found = []
    with contextlib.suppress(OSError):  # nothing was refused
        for line in (folder / REFUSED).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # torn by a full disk
                found.append(json.loads(line))
    return found


def mark_ended(folder: Path, status: str) -> None:
    """Add an end to a journal that has none, as that of a run whose process was killed."""
    ends = [entry["status"] for entry, _ in Reader(folder).read() if "status" in entry]
    if (folder / JOURNAL).exists() and (not ends or ends[-1] == "RUNNING"):
        Journal(folder).add(status=status, tags={})


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points (step, value) of a curve; empty if the journal or the curve is missing."""
    entries = (entry for entry, _ in Reader(folder).read() if name in entry.get("metrics", ()))
    return [(entry["step"], entry["metrics"][name]) for entry in entries]


def to_line(entry: Mapping[str, Any]) -> bytes:
    """An entry as it stands in the file."""
    return (json.dumps(entry, default=str) + "\n").encode()


def now_ms() -> int:
    """MLflow's time."""
    return int(time.time() * 1000)


def _drop_torn_line(file: BinaryIO | Any) -> None:
    """Cut off what a killed process or a full disk left of a line."""
    size = file.seek(0, os.SEEK_END)
    if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
