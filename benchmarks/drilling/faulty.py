"""pretrain.py with something that happens to it: what a run of the drill is.

    MIXMAE_DRILL='{"kind": ..., "steps": [...], "notes": FOLDER, "pace_s": 0}' python benchmarks/drilling/faulty.py ...

Each fault strikes once, over all restarts, and leaves a mark in the notes; so do the rows of every batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `python benchmarks/drilling/faulty.py`

from benchmarks.drilling.deadly import DeadlySource, mark
from mixmae.data.order import Plan
from mixmae.jobs.pretraining import PretrainJob
from mixmae.step import StepOutput
from mixmae.training import checkpoint, elastic, saving, watchdog, worker
from pipelines import pretrain

FAULT = "MIXMAE_DRILL"
SEEN = "seen.jsonl"
"""In the notes: a line for each batch of each worker."""
HURRY = "hurry"
"""In the notes; once it is there, steps take no longer than they must."""
OFFSET = "offset"
"""In the notes: seconds by which the clock of the driver and the workers is wrong."""
HOLD_S = 2.0
"""How long a save or a panel takes into which a signal comes."""


@dataclass(frozen=True, kw_only=True)
class FaultyJob(PretrainJob):
    """A pretraining that something happens to when the batch of a step has come."""

    kind: str = ""
    steps: tuple[int, ...] = ()
    notes: str = ""
    pace_s: float = 0.0

    def build_model(self) -> torch.nn.Module:
        if self.kind == "hang":
            watchdog.LEAST_S = 8.0  # before the worker makes its watchdog
        elif self.kind == "clock":
            _set_the_clock(self.notes)
        return super().build_model()

    @contextlib.contextmanager
    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> Iterator[Iterator[Any]]:
        if self.kind == "disk":
            _fail_to_write(self)
        elif self.kind == "save":
            _write_slowly(self)
        job: PretrainJob = self
        if self.kind.startswith("image "):
            job = replace(self, source=self._deadly(), kind="")
        with PretrainJob.open_batches(job, rank=rank, num_workers=num_workers, start_step=start_step) as batches:
            yield self._watched(batches, start_step, rank, num_workers)

    def _deadly(self) -> Any:
        size = self.config.loop.batch_size
        plan = Plan(chunk_sizes=self.source.chunk_sizes, seed=self.config.loop.seed, window_rows=self.data.window_rows)
        row = int(plan.rows_at(self.steps[0] * size, self.steps[0] * size + 1)[0][0])
        when: Any = self.kind.removeprefix("image ")
        return DeadlySource(self.source, row, when, self._mark(self.steps[0]))

    def _watched(self, batches: Iterator[Any], step: int, rank: int, num_workers: int) -> Iterator[Any]:
        for batch in batches:
            self._note({"step": step, "rank": rank, "of": num_workers, "rows": batch.rows.tolist()})
            if self.pace_s and not Path(self.notes, HURRY).exists():
                time.sleep(self.pace_s)
            if self.kind == "nan for ever" and step >= self.steps[0]:
                self.first_time(self.steps[0])
                _state["bad"] = True
            elif step in self.steps and self.kind in _STRIKES and self.first_time(step):
                _STRIKES[self.kind]()
            yield batch
            step += 1

    def _note(self, content: dict[str, Any]) -> None:
        with Path(self.notes, SEEN).open("ab", buffering=0) as file:
            file.write(json.dumps(content).encode() + b"\n")  # one write: lines of several workers do not mix

    def step(self, model: Any, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        output = super().step(model, batch, generator, first_sample)
        if _state.pop("bad", False):
            return StepOutput(loss=output.loss * float("nan"), metrics=output.metrics)
        return output

    def draw_panel(self, model: torch.nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        if self.kind == "panel" and self.first_time(self.steps[0]):
            time.sleep(HOLD_S)
        return super().draw_panel(model)

    def first_time(self, step: int) -> bool:
        """Whether the fault of this step has not struck before; leaves a mark."""
        return mark(self._mark(step))

    def _mark(self, step: int) -> str:
        return f"{self.notes}/fault {step}"


_state: dict[str, bool] = {}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise RuntimeError("something that may pass")


def _run_out_of_memory() -> None:
    raise MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")


def _spoil() -> None:
    _state["bad"] = True


_STRIKES: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "raise": _fail,
    "memory": _run_out_of_memory,
    "hang": lambda: time.sleep(1e6),
    "nan": _spoil,
}


def _fail_to_write(job: FaultyJob) -> None:
    honest = saving.write_parts

    def write(directory: Path, *rest: Any) -> None:
        if any(directory.name == f"step_{step:07d}" and job.first_time(step) for step in job.steps):
            raise OSError(28, "No space left on device")
        honest(directory, *rest)

    saving.write_parts = write  # type: ignore[attr-defined]


def _write_slowly(job: FaultyJob) -> None:
    """The disk takes its time at the checkpoint of a step."""
    honest = checkpoint.flush

    def flush(path: Path) -> None:
        if path.parent.name.endswith(f"step_{job.steps[0]:07d}") and job.first_time(job.steps[0]):
            time.sleep(HOLD_S)
        honest(path)

    checkpoint.flush = flush  # type: ignore[attr-defined]


def _set_the_clock(notes: str) -> None:
    """All of this process's Python, Ray's and MLflow's too, sees the time of day that the notes say.

    libfaketime would do it for all code, but a Python of 3.11 cannot sleep under it.
    """
    honest = time.time

    def now() -> float:
        offset = Path(notes, OFFSET)
        return honest() + (float(offset.read_text()) if offset.is_file() else 0.0)

    time.time = now


def _kill_mailbox(step: int, notes: str) -> None:
    import ray

    opened, honest = [], worker.open_mailbox

    def open_mailbox() -> Any:
        opened.append(honest())
        return opened[-1]

    def kill() -> None:
        progress = Path(sys.argv[sys.argv.index("--output") + 1]) / "progress.json"
        while not (progress.is_file() and f'"step": {step}' in progress.read_text()):
            time.sleep(0.05)
        mark(f"{notes}/fault {step}")
        ray.kill(opened[0])

    worker.open_mailbox = open_mailbox
    Thread(target=kill, daemon=True).start()


def main() -> int:
    """The command line of pretrain.py."""
    from benchmarks.drilling import faulty  # the workers import it by this name

    fields = json.loads(os.environ[FAULT])
    fields["steps"] = tuple(fields["steps"])
    original = faulty.FaultyJob.__init__

    def init(self: Any, **given: Any) -> None:
        original(self, **{**fields, **given})

    faulty.FaultyJob.__init__ = init  # type: ignore[method-assign]
    pretrain.PretrainJob = faulty.FaultyJob  # type: ignore[misc]
    elastic.LOOK_S, elastic.STEADY_S, elastic.FIRST_PAUSE_S = 1.0, 3.0, 5.0
    if fields["kind"] == "clock":
        _set_the_clock(fields["notes"])
    if fields["kind"] == "mailbox":
        _kill_mailbox(fields["steps"][0], fields["notes"])
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
