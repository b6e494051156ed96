"""Where the runs of a drill are, and what came of them beside a run that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors.torch
import torch

from benchmarks.drilling.faulty import FAULT, SEEN

ROOT = Path(__file__).parents[2]
FAULTY = "benchmarks/drilling/faulty.py"
STEPS, EVERY = 60, 10
SETTINGS = (
    *("demo", "--loop.steps", str(STEPS), "--loop.batch-size", "16", "--loop.log-every-steps", "5"),
    *("--loop.checkpoint-every-epochs", str(16 * EVERY / 4000), "--probe.images", "0", "--loop.max-bad-steps", "3"),
)
LIMIT_S = 300
TOLERANCE = 1e-4
"""Largest difference of a weight where the number of workers changes: floats are added in another order."""


class LeftOut(RuntimeError):
    """This machine cannot have a fault; the message says why."""


class Program:
    """A process with the lines that it has printed and when, as seconds of the clock."""

    def __init__(self, words: list[str], cwd: Path, variables: Mapping[str, str]) -> None:
        self.started = time.time()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            words, cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line))  # as it comes

    def wait(self) -> int:
        """Returns: its exit status, once it has ended; it is killed after LIMIT_S."""
        try:
            return self.process.wait(LIMIT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def wait_for(self, pattern: str) -> None:
        """Wait until a line has been printed."""
        self.wait_until(lambda: any(re.search(pattern, line) for _, line in self.lines), pattern)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while it runs.   Raises: RuntimeError if it ends before, or LIMIT_S pass."""
        end = time.monotonic() + LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.text}\nwaited for {what} in vain")
            time.sleep(0.02)

    def line(self, pattern: str) -> str:
        """The first line with a pattern; empty if there is none."""
        return next((line.strip() for _, line in list(self.lines) if re.search(pattern, line)), "")

    @property
    def text(self) -> str:
        return "".join(line for _, line in list(self.lines))

    @property
    def steps(self) -> list[tuple[float, int]]:
        """The steps that it has told, and when."""
        found = [(at, re.match(r"step (\d+)/", line)) for at, line in list(self.lines)]
        return [(at, int(match.group(1))) for at, match in found if match]


@dataclass
class Outcome:
    """What a fault did."""

    injected: str
    recovered_s: float | None = None
    """From the fault, or from the command given again, to the next line of progress beyond it."""
    lost: int | None = None
    """Images that went into the undisturbed run's weights and not, at the same step, into this one's."""
    twice: int | None = None
    """And images that went into this one's alone."""
    weights: str = ""
    """`identical`: weights and optimiser are those of the undisturbed run, bit for bit."""
    said: str = ""
    """What the run, or its end, told."""


@dataclass
class Ground:
    """A folder of runs, on Rays of their own or on a cluster.

    Args: variables: of the environment of all runs, beside the process's own; flags: of all of them.
    """

    folder: Path
    workers: int | str = 1
    variables: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def notes(self, output: Path) -> Path:
        """The folder for what a run leaves beside its output."""
        notes = output.with_name(f"{output.name}.notes")
        notes.mkdir(parents=True, exist_ok=True)
        return notes

    def fault(self, output: Path, kind: str = "", steps: tuple[int, ...] = (), pace_s: float = 0.0) -> str:
        """The value of FAULT."""
        return json.dumps({"kind": kind, "steps": steps, "notes": str(self.notes(output)), "pace_s": pace_s})

    def start(
        self,
        output: Path,
        *fault: Any,
        workers: int | str | None = None,
        flags: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Program:
        """Start, or continue, a run.   Args: fault, more: as of `fault`."""
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
            FAULT: self.fault(output, *fault, **more),
            **self.variables,
            **(variables or {}),
        }
        words = [sys.executable, str(ROOT / FAULTY), *SETTINGS, "--output", str(output), *self.flags, *flags]
        words += ["--workers", str(workers or self.workers)]
        return Program(words, self.folder, environment)

    def undisturbed(self, workers: int | str | None = None, *fault: Any) -> Path:
        """The run that nothing happens to, or nothing but this; made once."""
        workers = workers or self.workers
        output = self.folder / "-".join(["undisturbed", str(workers), *(str(fault[0]).split() if fault else ())])
        if not self.last_checkpoint(output).is_dir():
            done = self.start(output, *fault, workers=workers)
            assert done.wait() == 0, done.text
        return output

    def last_checkpoint(self, output: Path) -> Path:
        """Of a finished run."""
        return output / "checkpoints" / f"step_{STEPS:07d}"

    def compare(self, outcome: Outcome, output: Path, reference: Path | None = None, *, exact: bool = True) -> Outcome:
        """Fill in what came of a run.

        Args: reference: the undisturbed run.  exact: its weights shall be the same, bit for bit, else nearly.
        Raises: AssertionError if they are not, or if images were lost or seen twice.
        """
        reference = reference or self.undisturbed()
        seen, expected = (_images(self.notes(side) / SEEN) for side in (output, reference))
        outcome.lost, outcome.twice = (expected - seen).total(), (seen - expected).total()
        sides = [self.last_checkpoint(side) for side in (output, reference)]
        if exact:
            states = list(zip(*(_tensors(side) for side in sides), strict=True))
            same = all(ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) for ours, theirs in states)
            outcome.weights = "identical" if same else "OTHERS"
        else:
            weights = [safetensors.torch.load_file(side / "model.safetensors") for side in sides]
            largest = max((value - weights[1][name]).abs().max().item() for name, value in weights[0].items())
            same = largest < TOLERANCE
            outcome.weights = f"within {largest:.0e}" if same else f"OFF BY {largest:.0e}"
        if not same or outcome.lost or outcome.twice:
            raise AssertionError(outcome)
        return outcome


def _images(seen: Path) -> Counter[tuple[int, int]]:
    """(step, row) of the images in a run's weights: of each step those of all workers that did it last."""
    last: dict[int, dict[int, dict[str, Any]]] = {}
    for line in seen.read_text().splitlines():
        record = json.loads(line)
        others = last.setdefault(record["step"], {})
        if any(other["of"] != record["of"] for other in others.values()):
            others.clear()
        others[record["rank"]] = record
    return Counter((step, row) for step, ranks in last.items() for record in ranks.values() for row in record["rows"])


def _tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All of the weights and of the optimiser's state."""
    yield from sorted(safetensors.torch.load_file(checkpoint / "model.safetensors").items())
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    for key, part in sorted(state.items()):
        yield from ((f"{key} {name}", value) for name, value in sorted(part.items()))


def recovery(run: Program, since: float, beyond: int) -> float | None:
    """Seconds from a moment to the first line of progress beyond a step."""
    return next((at - since for at, step in run.steps if at > since and step > beyond), None)
