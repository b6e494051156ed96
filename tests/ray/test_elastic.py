"""A run with --workers 1:3 on two raylets: one dies and comes back, and the weights are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import psutil
import pytest
import safetensors.torch
import torch

from mixmae.data.prepare import open_for_training
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.supervised import HELDOUT_IMAGES
from mixmae.tracking import points
from pipelines.command import recipe_command
from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES
from tests.mlflow_server import free_port
from tests.ray.conftest import ROOT, TINY, environment, run
from tests.ray.paced import HURRY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(590)]

STEPS = 120
FLAGS = [
    *TINY,
    *("--loop.steps", str(STEPS), "--loop.max-broken-fraction", "0.2", "--probe.images", "0"),
    *("--loop.evaluate-every-epochs", "100"),
]


@dataclass
class Program:
    """A process in a session of its own, with the lines that it has printed."""

    words: list[str]
    cwd: Path
    variables: dict[str, str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            self.words, cwd=self.cwd, env=self.variables, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, limit_s: float = 240) -> None:
        wait_until(lambda: re.search(pattern, self.text) is not None, self, limit_s, pattern)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it with all processes that it has started."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for process in [*children, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        self._reader.join(10)


def wait_until(condition: Callable[[], bool], program: Program, limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert program.process.poll() is None, program.text
        assert time.monotonic() < deadline, f"{what}:\n{program.text}"
        time.sleep(0.2)


@dataclass
class TwoNodes:
    """A head that stays, and a node that a test may take away and bring back, with two CPUs each."""

    folder: Path

    def __post_init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        ray = str(Path(sys.executable).with_name("ray"))
        self.variables = environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1"
        )
        self._start = [ray, "start", "--block", "--num-cpus", "2", "--object-store-memory", "300000000"]
        port = self.address.rpartition(":")[2]
        self.head = Program(
            [*self._start, "--head", "--port", port, "--include-dashboard", "false", "--temp-dir", f"/tmp/e_{port}"],
            self.folder,
            self.variables,
        )
        self.head.wait_for("--block")
        self.node: Program | None = None

    def bring_node(self) -> None:
        self.node = Program([*self._start, "--address", self.address], self.folder, self.variables)
        self.node.wait_for("--block")

    def lose_node(self) -> None:
        """Kill its raylet, as the loss of a machine does; all else there ends with it."""
        assert self.node is not None
        for process in psutil.Process(self.node.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    process.kill()
        self.node.end(signal.SIGKILL)

    def close(self) -> None:
        for program in (self.node, self.head):
            if program is not None:
                program.end()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    cluster = TwoNodes(tmp_path)
    try:
        cluster.bring_node()
        yield cluster
    finally:
        cluster.close()


def undisturbed(photos: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the same steps in one process, without Ray."""
    chosen: list[PretrainConfig] = []

    def choose(arguments: Arguments, recipe: str) -> int:
        chosen.append(arguments.config)
        return 0

    recipe_command(choose, Arguments, ["demo", *FLAGS], program="", about="", recipes=PRETRAIN_RECIPES)
    source, heldout = open_for_training(str(photos), folder, HELDOUT_IMAGES)
    job = PretrainJob.of(chosen[0], source, heldout, data=None, folder=folder)
    model = build_seeded(job)
    train_in_process(job, model)
    return dict(model.state_dict())


def test_a_run_goes_on_with_fewer_workers_and_grows_again(nodes, photos, tmp_path):
    output = tmp_path / "runs" / "elastic"
    words = [sys.executable, str(ROOT / "tests" / "ray" / "paced.py"), "demo", *FLAGS, "--data", str(photos)]
    words += ["--output", str(output), "--workers", "1:3", "--ray-address", nodes.address]
    program = Program(words, tmp_path, nodes.variables)
    try:
        program.wait_for(r"training with 3 workers of 1:3")
        program.wait_for(r"step 15/")
        nodes.lose_node()
        program.wait_for(r"starting new workers, from the last checkpoint, after ")
        program.wait_for(r"training with 1 workers of 1:3")
        program.wait_for(r"continuing from step [1-9]")
        nodes.bring_node()
        program.wait_for(r"there is room for 3 workers: saving, and starting again with more than 1")
        program.wait_for(r"(?s)more than 1.*training with 3 workers of 1:3.*continuing from step [1-9]")
        (output / HURRY).touch()
        assert program.process.wait(240) == 0, program.text
    finally:
        program.end()
    text = program.text
    assert f"step {STEPS}/{STEPS}" in text
    assert len(re.findall("starting new workers", text)) == 1, text  # to grow is no failure
    starts = [json.loads(line) for line in (output / "starts.jsonl").read_text().splitlines()]
    assert [start["workers"] for start in starts] == [3, 1, 3]
    steps = [start["step"] for start in starts]
    assert steps[0] == 0 < steps[1] <= steps[2] < STEPS
    counts = points(output, "perf/workers")
    assert [step for step, _ in counts] == [1, *range(5, STEPS + 1, 5)]
    assert {count for _, count in counts} == {1, 3}
    # What it had done when it was asked to end was not done again.
    asked_at = int(re.findall(r"step (\d+)/", text.partition("there is room for 3")[0])[-1])
    assert steps[2] >= asked_at
    told = run(output, cwd=tmp_path, pipeline="status")
    assert f"workers     3 from step {steps[2]}, since " in told.stdout
    assert f"; at the starts before 3 from step 0, 1 from step {steps[1]}\n" in told.stdout
    assert "restarts    1\n" in told.stdout

    weights = safetensors.torch.load_file(output / "checkpoints" / f"step_{STEPS:07d}" / "model.safetensors")
    expected = undisturbed(photos, tmp_path / "data")
    assert weights.keys() == expected.keys()
    largest = max((weights[name] - value).abs().max().item() for name, value in expected.items())
    print(f"largest difference of a weight: {largest:.1e}")
    assert largest < 2e-4
