"""Faults of a run on a Ray of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.drilling.faulty import HURRY, OFFSET
from benchmarks.drilling.ground import Ground, Outcome, Program, recovery
from mixmae.tracking import Reader, backlog
from mixmae.training.checkpoint import list_checkpoints
from mixmae.writing import write_text
from tests.mlflow_server import MlflowServer

Damage = Callable[[Path], object]


def strike(ground: Ground, name: str, kind: str, steps: tuple[int, ...], injected: str, says: str) -> Outcome:
    """A fault that the run must survive by itself."""
    output = ground.folder / name
    run = ground.start(output, kind, steps)
    assert run.wait() == 0, run.text
    struck = max((mark.stat().st_mtime for mark in ground.notes(output).glob("fault *")), default=None)
    assert struck is not None, "the fault has not struck"
    recovered = recovery(run, struck, steps[-1])
    return ground.compare(Outcome(injected, recovered, said=run.line(says)), output)


def worker_killed(ground: Ground) -> Outcome:
    return strike(ground, "worker_killed", "kill", (25,), "SIGKILL of the worker in step 25", "starting new workers")


def four_exceptions(ground: Ground) -> Outcome:
    steps = (12, 23, 34, 45)
    return strike(
        ground, "four_exceptions", "raise", steps, "an exception in steps 12, 23, 34 and 45", "starting new workers"
    )


def frozen_stream(ground: Ground) -> Outcome:
    outcome = strike(ground, "frozen_stream", "hang", (25,), "no batch comes after step 25", "no batch and no step")
    assert (ground.folder / "frozen_stream" / "stacks_rank0.txt").stat().st_size > 500
    return outcome


def disk_full(ground: Ground) -> Outcome:
    injected = "disk full at the checkpoints of steps 20 and 30"
    outcome = strike(ground, "disk_full", "disk", (20, 30), injected, "could not be written")
    assert outcome.said, "the run did not say so"
    return outcome


def mailbox_killed(ground: Ground) -> Outcome:
    return strike(ground, "mailbox_killed", "mailbox", (20,), "the mailbox actor dies after step 20", "Finished")


def decoder_killed(ground: Ground) -> Outcome:
    injected = "the process that decodes an image of step 25 is killed, once"
    outcome = strike(ground, "decoder_killed", "image once", (25,), injected, "could not be decoded")
    assert not outcome.said, "the image was taken for broken"
    return outcome


def deadly_image(ground: Ground) -> Outcome:
    output = ground.folder / "deadly_image"
    run = ground.start(output, "image always", (25,))
    assert run.wait() == 0, run.text
    ledger = (output / "broken_images.jsonl").read_text()
    assert ledger.count("\n") == 1, ledger
    found = json.loads(ledger)
    assert "SIGKILL" in found["reason"], found
    injected = "an image of step 25 kills each process that decodes it; beside a run in which it is broken"
    said = f"{Path(found['where']).name}: {found['reason']}"
    return ground.compare(Outcome(injected, said=said), output, ground.undisturbed(1, "image broken", (25,)))


def nan_once(ground: Ground) -> Outcome:
    output = ground.folder / "nan_once"
    run = ground.start(output, "nan", (33,))
    assert run.wait() == 0, run.text
    again = ground.folder / "nan_once_and_killed"
    other = ground.start(again, "nan", (33,))
    other.wait_for(r"^step 45/")
    other.kill()
    other = ground.start(again, "nan", (33,))
    assert other.wait() == 0, other.text
    injected = "a loss of NaN in step 34, alone; the same beside a run that was killed later"
    return ground.compare(Outcome(injected, said="left out, and counted"), output, again)


def nan_for_ever(ground: Ground) -> Outcome:
    output = ground.folder / "nan_for_ever"
    run = ground.start(output, "nan for ever", (33,))
    status = run.wait()
    assert status == 1, run.text
    assert "going back to the last checkpoint" in run.text, run.text
    assert list_checkpoints(output / "checkpoints")[0].name == "step_0000030"
    assert (output / "diverged" / "rank0" / "batch.pt").is_file()
    return Outcome("losses of NaN from step 34 on", said=f"exit status {status}: {run.line('has diverged')}")


def out_of_memory(ground: Ground) -> Outcome:
    output = ground.folder / "out_of_memory"
    run = ground.start(output, "memory", (25,))
    status = run.wait()
    assert status == 1, run.text
    assert "starting new workers" not in run.text, run.text
    outcome = Outcome("memory does not suffice in step 25", said=run.line("enough memory"))
    return again(ground, outcome, output, run)


def again(
    ground: Ground,
    outcome: Outcome,
    output: Path,
    before: Program,
    *,
    workers: int | None = None,
    reference: Path | None = None,
) -> Outcome:
    """The same command again, to the end, perhaps with another number of workers."""
    run = ground.start(output, workers=workers)
    assert run.wait() == 0, run.text
    outcome.recovered_s = recovery(run, run.started, max((step for _, step in before.steps), default=0))
    outcome.said += f"; {run.line('continuing from step') or 'begun again'}"
    return ground.compare(outcome, output, reference, exact=workers is None)


def signalled(
    ground: Ground,
    name: str,
    number: signal.Signals,
    when: str,
    kind: str = "",
    steps: tuple[int, ...] = (),
    check: Callable[[Path], bool] = lambda output: True,
) -> Outcome:
    """A signal to the command when it has printed a line, or when a fault has left its mark; then it is given again.

    Args: check: what must be so at that moment.
    """
    output = ground.folder / name
    run = ground.start(output, kind, steps)
    if kind:
        mark = ground.notes(output) / f"fault {steps[0]}"
        run.wait_until(mark.exists, str(mark))
    else:
        run.wait_for(when)
    assert check(output), "it was too late"
    sent = time.time()
    run.process.send_signal(number)
    status = run.wait()
    took = time.time() - sent
    assert status == (-number if number == signal.SIGKILL else 128 + number), (status, run.text)
    assert "Traceback" not in run.text, run.text
    said = f"exit status {status} after {took:.1f} s"
    return again(ground, Outcome(f"{number.name} to the command, {when.strip('^/')}", said=said), output, run)


def _is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob(".partial.*.step_*"))


def terminated(ground: Ground) -> Outcome:
    outcome = signalled(ground, "terminated", signal.SIGTERM, r"^step 25/")
    assert "continuing from step 2" in outcome.said or "continuing from step 3" in outcome.said, outcome
    return outcome


def interrupted(ground: Ground) -> Outcome:
    return signalled(ground, "interrupted", signal.SIGINT, r"^step 25/")


def driver_killed(ground: Ground) -> Outcome:
    return signalled(ground, "driver_killed", signal.SIGKILL, r"^step 25/")


def terminated_at_the_start(ground: Ground) -> Outcome:
    outcome = signalled(ground, "terminated_at_the_start", signal.SIGTERM, r"^output ")
    outcome.injected = "SIGTERM to the command, while workers start"
    return outcome


def terminated_in_a_save(ground: Ground) -> Outcome:
    name = "terminated_in_a_save"
    return signalled(ground, name, signal.SIGTERM, "in a save of step 20", "save", (20,), _is_saving)


def killed_in_a_save(ground: Ground) -> Outcome:
    name = "killed_in_a_save"
    return signalled(ground, name, signal.SIGKILL, "in a save of step 20", "save", (20,), _is_saving)


def terminated_in_a_panel(ground: Ground) -> Outcome:
    return signalled(ground, "terminated_in_a_panel", signal.SIGTERM, "in the first panel", "panel", (0,))


def interrupted_in_a_panel(ground: Ground) -> Outcome:
    return signalled(ground, "interrupted_in_a_panel", signal.SIGINT, "in the first panel", "panel", (0,))


def damaged(ground: Ground, name: str, injected: str, damage: Damage) -> Outcome:
    """Damage to the newest checkpoint of an interrupted run."""
    output = ground.folder / name
    run = ground.start(output)
    run.wait_for(r"^step 35/")
    run.process.terminate()
    assert run.wait() == 128 + signal.SIGTERM, run.text
    damage(list_checkpoints(output / "checkpoints")[0])
    resumed = ground.start(output)
    assert resumed.wait() == 0, resumed.text
    said = resumed.line("passed over") or resumed.line("continuing from step")
    newest = max(step for _, step in run.steps)
    return ground.compare(Outcome(injected, recovery(resumed, resumed.started, newest), said=said), output)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def weights_cut(ground: Ground) -> Outcome:
    injected = "the newest model.safetensors is cut in half"
    return damaged(ground, "weights_cut", injected, lambda newest: _halve(newest / "model.safetensors"))


def optimizer_bit(ground: Ground) -> Outcome:
    injected = "a bit of the newest optimizer.pt flips"
    return damaged(ground, "optimizer_bit", injected, lambda newest: _flip(newest / "optimizer.pt"))


def state_empty(ground: Ground) -> Outcome:
    injected = "the newest state.json is empty"
    return damaged(ground, "state_empty", injected, lambda newest: (newest / "state.json").write_text(""))


def newest_deleted(ground: Ground) -> Outcome:
    return damaged(ground, "newest_deleted", "the newest checkpoint is deleted", shutil.rmtree)


def resized(ground: Ground, name: str, first: int, then: int) -> Outcome:
    """Another number of workers for the rest of a run."""
    output = ground.folder / name
    run = ground.start(output, workers=first)
    run.wait_for(r"^step 25/")
    run.process.terminate()
    status = run.wait()
    assert status == 128 + signal.SIGTERM, run.text
    outcome = Outcome(f"SIGTERM, and {then} instead of {first} workers", said=f"exit status {status}")
    return again(ground, outcome, output, run, workers=then, reference=ground.undisturbed(first))


def one_to_two(ground: Ground) -> Outcome:
    return resized(ground, "one_to_two", 1, 2)


def two_to_one(ground: Ground) -> Outcome:
    return resized(ground, "two_to_one", 2, 1)


def second_run(ground: Ground) -> Outcome:
    output = ground.folder / "second_run"
    run = ground.start(output, pace_s=0.5)
    run.wait_for(r"^step 10/")
    second = ground.start(output)
    status = second.wait()
    (ground.notes(output) / HURRY).touch()
    assert status == 1, second.text
    assert run.wait() == 0, run.text
    said = f"the second: exit status {status}, {second.line(' is in use by ')}"
    return ground.compare(Outcome("a second run with the same output", said=said), output)


def mlflow_killed(ground: Ground) -> Outcome:
    from mlflow import MlflowClient

    folder = ground.folder / "mlflow"
    folder.mkdir()
    server = MlflowServer(f"sqlite:///{folder}/mlflow.db", folder)
    output = ground.folder / "mlflow_killed"
    try:
        server.start()
        run = ground.start(output, pace_s=0.5, flags=("--mlflow-uri", server.address))
        run.wait_for(r"^step 15/")
        server.kill()
        run.wait_for(r"^step 40/")
        behind = backlog(output)
        assert behind, "MLflow had all points while it was away"
        server.start()
        (ground.notes(output) / HURRY).touch()
        assert run.wait() == 0, run.text
        assert not backlog(output), run.text
        expected: Counter[tuple[str, int]] = Counter()
        for entry, _ in Reader(output).read():
            expected.update((name, entry["step"]) for name in entry.get("metrics", {}))
        client = MlflowClient(tracking_uri=server.address)
        run_id = json.loads((output / "run.json").read_text())["mlflow"]["run_id"]
        names = {name for name, _ in expected}
        there = Counter((name, point.step) for name in names for point in client.get_metric_history(run_id, name))
        assert there == expected, (there - expected, expected - there)
        assert set(there.values()) == {1}, there
    finally:
        server.kill()
    injected = "the MLflow server is killed after step 15, and back after step 40"
    said = f"{behind} points waited; MLflow has all {there.total()} once"
    return ground.compare(Outcome(injected, said=said), output)


def clock_jumps(ground: Ground) -> Outcome:
    output = ground.folder / "clock_jumps"
    run = ground.start(output, "clock", pace_s=0.3)
    for step, seconds in ((15, "3600"), (30, "-3600")):
        run.wait_for(rf"^step {step}/")
        write_text(ground.notes(output) / OFFSET, seconds)
    struck = time.time()
    (ground.notes(output) / HURRY).touch()
    assert run.wait() == 0, run.text
    injected = "the clock jumps an hour ahead after step 15, and two hours back after step 30"
    times = [entry["time"] for entry, _ in Reader(output).read() if "metrics" in entry]
    said = f"the times of its points lie {(max(times) - min(times)) / 1000:.0f} s apart"
    assert max(times) - min(times) > 7000e3, said
    return ground.compare(Outcome(injected, recovery(run, struck, 30), said=said), output)


FAULTS = (
    *(worker_killed, four_exceptions, frozen_stream, out_of_memory, mailbox_killed, disk_full, mlflow_killed),
    *(decoder_killed, deadly_image),
    *(terminated, interrupted, driver_killed, terminated_at_the_start, terminated_in_a_save, killed_in_a_save),
    *(terminated_in_a_panel, interrupted_in_a_panel),
    *(weights_cut, optimizer_bit, state_empty, newest_deleted, nan_once, nan_for_ever),
    *(one_to_two, two_to_one, second_run, clock_jumps),
)
