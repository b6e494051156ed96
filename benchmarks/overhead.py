"""What Ray and checkpoints cost a run whose steps are slow: one worker under Ray beside the bare loop.

    python benchmarks/overhead.py [--steps 60] [--width 96]

The bare loop has its images in memory; the run of pretrain.py has its stream, its messages, MLflow's journal and its
checkpoints. Both train the same model with the same number of threads, in turns. Training leaves a core to all that:
with --spare-cores 0 it takes that core, too, and waits whenever it is needed. Then a Swin-B with its optimiser is
saved while nothing else runs: how long training would stand still, beside a plain copy of as many bytes. The last line
is JSON. Needs quiet cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/overhead.py`

from mixmae.data.prepare import open_for_training
from mixmae.encoders.build import build_encoder
from mixmae.jobs.in_process import batches_of, build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.machine import threads_per_process
from mixmae.methods.build import build_method
from mixmae.tracking import points
from mixmae.training.loop import Silent
from mixmae.training.optim import build_optimizer
from mixmae.training.saving import CheckpointWriter
from pipelines.command import command
from pipelines.recipes.demo import demo
from pipelines.recipes.mixmae_swin import mixmae_swin_base_600ep

LOG_EVERY = 5
PRETRAIN = Path(__file__).parents[1] / "pipelines" / "pretrain.py"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The model's size and how long it trains."""

    steps: int = 60
    """Steps of each run."""
    width: int = 96
    """Channels of the demo's encoder in its first stage; wide enough that computing takes nearly all of the time."""
    rounds: int = 2
    """Runs of each kind, in turns."""
    spare_cores: int = 1
    """Cores that training leaves free, in both."""
    swin_b: bool = True
    """Also save a Swin-B."""


class _Rates(Silent):
    """Keeps the images per second of each log."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[Any]) -> None:
        self.rates.append(record["images_per_s"])


def bare(job: PretrainJob) -> list[float]:
    """Images per second of the loop alone, its batches in memory."""
    events = _Rates()
    train_in_process(job, build_seeded(job), events=events, batches=cycle(list(batches_of(job, 8))))
    return events.rates[2:]  # the first of them warm up


def under_ray(options: Arguments, output: Path) -> list[float]:
    """Images per second of pretrain.py with one worker."""
    words = [
        *(sys.executable, str(PRETRAIN), "demo", "--output", str(output), "--workers", "1", "--probe.images", "0"),
        *("--encoder.embed-dim", str(options.width), "--encoder.num-heads", "2", "4", "8"),
        *("--loop.steps", str(options.steps), "--loop.log-every-steps", str(LOG_EVERY)),
    ]
    # Python imports this first in each process of the run, and workers count their cores in this way.
    few = f"import os\nos.sched_getaffinity = lambda pid: set(range({torch.get_num_threads()}))\n"
    hook = output.with_name("few_cores")
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(few, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return [rate for _, rate in points(output, "perf/images_per_s")][2:]


def pause() -> dict[str, float]:
    """Seconds for which a Swin-B stands still when it is saved, the second time, and a plain copy of as many bytes."""
    config = mixmae_swin_base_600ep()
    model = build_method(build_encoder(config.sized_encoder()), config.method)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        writer.reserve(model, optimizer, None)
        pauses = []
        for step in (1, 2, 3):
            writer.wait()
            time.sleep(1)
            pauses.append(writer.save(step=step, model=model, optimizer=optimizer, average=None, state={}))
        written = time.perf_counter()
        last = writer.wait()
        written = time.perf_counter() - written
        assert last is not None
        size = sum(path.stat().st_size for path in last.iterdir())
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    copies = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
    return {
        "checkpoint_gb": round(size / 1e9, 2),
        "pause_s": round(statistics.median(pauses), 3),
        "plain_copy_s": round(statistics.median(copies), 3),
        "written_in_s": round(written, 1),
    }


def run(options: Arguments) -> int:
    """All legs, and the report.   Returns: the process's exit status."""
    torch.set_num_threads(max(1, threads_per_process(1) - options.spare_cores))
    with tempfile.TemporaryDirectory() as base:
        source, heldout = open_for_training("moths", Path(base) / "data", 60)
        config = demo()
        config = replace(
            config,
            encoder=replace(config.encoder, embed_dim=options.width, num_heads=(2, 4, 8)),
            loop=replace(config.loop, steps=options.steps, log_every_steps=LOG_EVERY),
            probe=replace(config.probe, images=0),
        )
        job = PretrainJob.of(config, source, heldout, data="moths", folder=Path(base))
        rates: dict[str, list[float]] = {"bare": [], "ray": []}
        for number in range(options.rounds):
            rates["bare"] += bare(job)
            rates["ray"] += under_ray(options, Path(base) / f"run{number}")
            print({name: round(statistics.median(values), 1) for name, values in rates.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    report = {
        "bare_images_per_s": round(medians["bare"], 1),
        "ray_images_per_s": round(medians["ray"], 1),
        "ray_per_bare": round(medians["ray"] / medians["bare"], 3),
        **(pause() if options.swin_b else {}),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="overhead.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
