"""What a run does when something breaks: one fault after the other, on a real local cluster.

    python benchmarks/drill.py [--faults NAME ...] [--output FOLDER]          (make drill)

Each fault strikes a small pretraining of 60 steps. Afterwards its weights and its optimiser are compared, bit for bit,
with those of a run that nothing happened to: if they are the same, no image was lost and none was seen twice. Prints a
table and writes it to FOLDER/table.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/drill.py`

from mixmae.jobs.pretraining import PretrainJob
from mixmae.step import StepOutput
from mixmae.training import saving, watchdog
from mixmae.training.checkpoint import list_checkpoints
from mixmae.writing import write_text
from pipelines.command import command

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 60, 10
SETTINGS = (
    *("demo", "--loop.steps", str(STEPS), "--loop.batch-size", "16", "--loop.log-every-steps", "5"),
    *("--loop.checkpoint-every-epochs", str(16 * EVERY / 4000), "--probe.images", "0", "--loop.max-bad-steps", "3"),
)
LIMIT_S = 300
FAULT = "MIXMAE_DRILL"
"""Variable that tells a child what shall happen, as "kind step,step folder"."""


@dataclass(frozen=True, kw_only=True)
class FaultyJob(PretrainJob):
    """A pretraining that something happens to when the batch of a step has come; each time once, over all restarts."""

    kind: str = ""
    steps: tuple[int, ...] = ()
    marks: str = ""

    def build_model(self) -> torch.nn.Module:
        if self.kind == "hang":
            watchdog.LEAST_S = 8.0  # before the worker makes its watchdog
        return super().build_model()

    @contextlib.contextmanager
    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> Iterator[Iterator[Any]]:
        if self.kind == "disk":
            _fail_to_write(self)
        with super().open_batches(rank=rank, num_workers=num_workers, start_step=start_step) as batches:
            yield self._watched(batches, start_step)

    def _watched(self, batches: Iterator[Any], step: int) -> Iterator[Any]:
        for batch in batches:
            if self.kind == "nan for ever" and step >= self.steps[0]:
                self.first_time(self.steps[0])
                _state["bad"] = True
            elif step in self.steps and self.kind != "disk" and self.first_time(step):
                if self.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.kind == "raise":
                    raise RuntimeError("something that may pass")
                elif self.kind == "memory":
                    raise MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")
                elif self.kind == "hang":
                    time.sleep(1e6)
                elif self.kind == "nan":
                    _state["bad"] = True
            yield batch
            step += 1

    def step(self, model: Any, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        output = super().step(model, batch, generator, first_sample)
        if _state.pop("bad", False):
            return StepOutput(loss=output.loss * float("nan"), metrics=output.metrics)
        return output

    def first_time(self, step: int) -> bool:
        """Whether the fault of this step has not struck before; leaves a mark."""
        try:
            os.close(os.open(f"{self.marks}/{self.kind} {step}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


_state: dict[str, bool] = {}


def _fail_to_write(job: FaultyJob) -> None:
    honest = saving.write_parts

    def write(directory: Path, *rest: Any) -> None:
        if any(directory.name == f"step_{step:07d}" and job.first_time(step) for step in job.steps):
            raise OSError(28, "No space left on device")
        honest(directory, *rest)

    saving.write_parts = write  # type: ignore[attr-defined]


def child() -> int:
    """What a run's process does: pretrain.py with a FaultyJob."""
    from benchmarks import drill  # the workers import it by this name
    from mixmae.training import worker
    from pipelines import pretrain

    kind, steps, marks = os.environ[FAULT].split("|")

    fields = {"kind": kind, "steps": tuple(map(int, filter(None, steps.split(",")))), "marks": marks}
    original = drill.FaultyJob.__init__

    def init(self: Any, **given: Any) -> None:
        original(self, **{**fields, **given})

    drill.FaultyJob.__init__ = init  # type: ignore[method-assign]
    pretrain.PretrainJob = drill.FaultyJob  # type: ignore[misc]
    if kind == "mailbox":
        import ray

        opened, honest = [], worker.open_mailbox

        def open_mailbox() -> Any:
            opened.append(honest())
            return opened[-1]

        def kill() -> None:
            progress = Path(sys.argv[sys.argv.index("--output") + 1]) / "progress.json"
            while not (progress.is_file() and f'"step": {fields["steps"][0]}' in progress.read_text()):
                time.sleep(0.05)
            Path(f"{marks}/mailbox").touch()
            ray.kill(opened[0])

        worker.open_mailbox = open_mailbox
        Thread(target=kill, daemon=True).start()
    return pretrain.main()


@dataclass
class Child:
    """A run in a process of its own, with the lines that it has printed and when."""

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]]
    reader: Thread

    def wait(self) -> int:
        """Returns: its exit status."""
        try:
            return self.process.wait(LIMIT_S)
        finally:
            self.process.kill()  # nothing, if it has ended
            self.reader.join(10)

    def wait_for(self, pattern: str) -> None:
        """Wait until a line has been printed."""
        end = time.monotonic() + LIMIT_S
        while not any(re.search(pattern, line) for _, line in self.lines):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{pattern} was not printed:\n" + self.text)
            time.sleep(0.02)

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)


@dataclass
class Ground:
    """Where the runs of a drill are, and the undisturbed one."""

    folder: Path
    workers: int = 1

    def start(self, output: Path, kind: str = "", steps: tuple[int, ...] = (), workers: int | None = None) -> Child:
        """Start, or continue, a run."""
        marks = output.with_name(f"{output.name}.marks")
        marks.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
            FAULT: f"{kind}|{','.join(map(str, steps))}|{marks}",
        }
        words = [sys.executable, __file__, *SETTINGS, "--output", str(output)]
        words += ["--workers", str(workers or self.workers)]
        process = subprocess.Popen(
            words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder
        )
        lines: list[tuple[float, str]] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append((time.time(), line))  # as it comes

        reader = Thread(target=read, daemon=True)
        reader.start()
        return Child(process, lines, reader)

    def undisturbed(self) -> Path:
        """The run that nothing happens to; made once."""
        output = self.folder / "undisturbed"
        if not (output / "checkpoints" / f"step_{STEPS:07d}").is_dir():
            done = self.start(output)
            assert done.wait() == 0, done.text
        return output

    def is_identical(self, output: Path, reference: Path | None = None) -> bool:
        """Whether the last weights and the optimiser are those of the undisturbed run, bit for bit."""
        import safetensors.torch

        sides = [side / "checkpoints" / f"step_{STEPS:07d}" for side in (output, reference or self.undisturbed())]
        weights = [safetensors.torch.load_file(side / "model.safetensors") for side in sides]
        states = [torch.load(side / "optimizer.pt", weights_only=True)["state"] for side in sides]
        return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()) and all(
            torch.equal(value, states[1][key][name]) for key, part in states[0].items() for name, value in part.items()
        )


@dataclass
class Outcome:
    """What a fault did."""

    injected: str
    recovered_s: float | None
    """From the fault to the next line of progress beyond it."""
    identical: bool | None
    """None: where it cannot be the same."""
    said: str = ""
    """What the run, or its end, told."""


def _recovery(run: Child, output: Path, beyond: int) -> float | None:
    marks = output.with_name(f"{output.name}.marks")
    struck = max((mark.stat().st_mtime for mark in marks.iterdir()), default=None)
    times = [at for at, line in run.lines if (found := re.match(r"step (\d+)/", line)) and int(found.group(1)) > beyond]
    later = [at for at in times if struck is not None and at > struck]
    return min(later) - struck if struck is not None and later else None


def _line(run: Child, pattern: str) -> str:
    return next((line.strip() for _, line in run.lines if re.search(pattern, line)), "")


def strike(ground: Ground, name: str, kind: str, steps: tuple[int, ...], injected: str, says: str = "") -> Outcome:
    """A fault inside a worker that the run must survive by itself."""
    output = ground.folder / name
    run = ground.start(output, kind, steps)
    assert run.wait() == 0, run.text
    return Outcome(
        injected, _recovery(run, output, steps[-1]), ground.is_identical(output), _line(run, says or "after")
    )


def worker_killed(ground: Ground) -> Outcome:
    return strike(ground, "worker_killed", "kill", (25,), "SIGKILL of the worker in step 25", "starting new workers")


def four_exceptions(ground: Ground) -> Outcome:
    return strike(
        ground, "four_exceptions", "raise", (12, 23, 34, 45), "an exception in steps 12, 23, 34 and 45", "starting new"
    )


def frozen_stream(ground: Ground) -> Outcome:
    outcome = strike(ground, "frozen_stream", "hang", (25,), "no batch comes after step 25", "no batch and no step")
    assert (ground.folder / "frozen_stream" / "stacks_rank0.txt").stat().st_size > 500
    return outcome


def disk_full(ground: Ground) -> Outcome:
    outcome = strike(
        ground, "disk_full", "disk", (20, 30), "disk full at the checkpoints of steps 20 and 30", "could not"
    )
    assert outcome.said, "the run did not say so"
    return outcome


def mailbox_killed(ground: Ground) -> Outcome:
    return strike(ground, "mailbox_killed", "mailbox", (20,), "the mailbox actor dies after step 20", "Finished")


def nan_once(ground: Ground) -> Outcome:
    output = ground.folder / "nan_once"
    run = ground.start(output, "nan", (33,))
    assert run.wait() == 0, run.text
    again = ground.folder / "nan_once_and_killed"
    other = ground.start(again, "nan", (33,))
    other.wait_for(r"^step 45/")
    other.process.kill()
    other.process.wait()
    other = ground.start(again, "nan", (33,))
    assert other.wait() == 0, other.text
    return Outcome("a loss of NaN in step 34, alone", None, ground.is_identical(output, again), "left out, and counted")


def nan_for_ever(ground: Ground) -> Outcome:
    output = ground.folder / "nan_for_ever"
    run = ground.start(output, "nan for ever", (33,))
    status = run.wait()
    assert status == 1, run.text
    assert "going back to the last checkpoint" in run.text, run.text
    assert list_checkpoints(output / "checkpoints")[0].name == "step_0000030"
    assert (output / "diverged" / "rank0" / "batch.pt").is_file()
    return Outcome("losses of NaN from step 34 on", None, None, f"exit status {status}: {_line(run, 'has diverged')}")


def out_of_memory(ground: Ground) -> Outcome:
    output = ground.folder / "out_of_memory"
    run = ground.start(output, "memory", (25,))
    status = run.wait()
    assert status == 1, run.text
    assert "starting new workers" not in run.text, run.text
    resumed = ground.start(output)
    assert resumed.wait() == 0, resumed.text
    return Outcome("memory does not suffice in step 25", None, ground.is_identical(output), _line(run, "enough memory"))


def signalled(ground: Ground, name: str, number: int, when: str, workers: int = 1) -> Outcome:
    """A signal to the command; then the same command again."""
    output = ground.folder / name
    run = ground.start(output, workers=workers)
    run.wait_for(when)
    sent = time.time()
    run.process.send_signal(number)
    status = run.wait()
    took = time.time() - sent
    expected = -number if number == signal.SIGKILL else 128 + number
    assert status == expected, (status, run.text)
    assert "Traceback" not in run.text, run.text
    resumed = ground.start(output)
    assert resumed.wait() == 0, resumed.text
    said = f"exit status {status} after {took:.1f} s; {_line(resumed, 'continuing from') or 'begun again'}"
    called = signal.Signals(number).name
    return Outcome(f"{called} to the command, {name}", None, ground.is_identical(output), said)


def terminated(ground: Ground) -> Outcome:
    outcome = signalled(ground, "sigterm_in_a_step", signal.SIGTERM, r"^step 25/")
    assert "continuing from step 2" in outcome.said or "continuing from step 3" in outcome.said, outcome
    return outcome


def interrupted(ground: Ground) -> Outcome:
    return signalled(ground, "sigint_in_a_step", signal.SIGINT, r"^step 25/")


def terminated_at_the_start(ground: Ground) -> Outcome:
    return signalled(ground, "sigterm_while_workers_start", signal.SIGTERM, r"^output ")


def driver_killed(ground: Ground) -> Outcome:
    return signalled(ground, "sigkill_in_a_step", signal.SIGKILL, r"^step 25/")


def damaged(ground: Ground, name: str, injected: str, damage: Callable[[Path], None]) -> Outcome:
    """Damage to the newest checkpoint of an interrupted run."""
    output = ground.folder / name
    run = ground.start(output)
    run.wait_for(r"^step 35/")
    run.process.terminate()
    assert run.wait() == 128 + signal.SIGTERM, run.text
    damage(list_checkpoints(output / "checkpoints")[0])
    resumed = ground.start(output)
    assert resumed.wait() == 0, resumed.text
    return Outcome(
        injected, None, ground.is_identical(output), _line(resumed, "passed over") or _line(resumed, "contin")
    )


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def weights_cut(ground: Ground) -> Outcome:
    return damaged(
        ground, "weights_cut", "the newest model.safetensors is cut in half", lambda c: _halve(c / "model.safetensors")
    )


def optimizer_bit(ground: Ground) -> Outcome:
    return damaged(
        ground, "optimizer_bit", "a bit of the newest optimizer.pt flips", lambda c: _flip(c / "optimizer.pt")
    )


def state_empty(ground: Ground) -> Outcome:
    return damaged(
        ground, "state_empty", "the newest state.json is empty", lambda c: (c / "state.json").write_text("") and None
    )


def newest_deleted(ground: Ground) -> Outcome:
    return damaged(ground, "newest_deleted", "the newest checkpoint is deleted", shutil.rmtree)


FAULTS: dict[str, Callable[[Ground], Outcome]] = {
    function.__name__: function
    for function in (
        *(worker_killed, four_exceptions, frozen_stream, out_of_memory, mailbox_killed, disk_full),
        *(terminated, interrupted, terminated_at_the_start, driver_killed),
        *(weights_cut, optimizer_bit, state_empty, newest_deleted, nan_once, nan_for_ever),
    )
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The faults, and where the runs go."""

    faults: tuple[str, ...] = tuple(FAULTS)
    """Names of faults; default: all."""
    output: Path = Path("runs/drill")
    """Folder for the runs and the table; deleted before."""


def run(arguments: Arguments) -> int:
    """Strike, compare, print.   Returns: the process's exit status: 1 if a fault was not survived as it should be."""
    unknown = sorted(set(arguments.faults) - set(FAULTS))
    if unknown:
        raise ValueError(f"there is no fault {unknown[0]!r}: choose of {', '.join(FAULTS)}.")
    folder = arguments.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ground = Ground(folder)
    ground.undisturbed()
    rows = ["| fault | recovered in | weights and optimiser identical | it said |", "|---|---:|---|---|"]
    failed = 0
    for name in arguments.faults:
        try:
            outcome = FAULTS[name](ground)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            failed += 1
            rows.append(f"| {name} | | FAILED | {str(error).strip().splitlines()[-1][:200]} |")
            print(error, flush=True)
        else:
            failed += outcome.identical is False
            seconds = "" if outcome.recovered_s is None else f"{outcome.recovered_s:.0f} s"
            same = {True: "yes", False: "NO", None: ""}[outcome.identical]
            rows.append(f"| {outcome.injected} | {seconds} | {same} | {outcome.said.replace('|', '/')} |")
        print(rows[-1], flush=True)
    write_text(folder / "table.md", "\n".join(rows) + "\n")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="drill.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(child() if FAULT in os.environ else main())
