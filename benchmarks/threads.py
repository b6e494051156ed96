"""Which division of this machine's cores trains fastest: one process of many threads, or processes of one thread.

    python benchmarks/threads.py [--recipe demo] [--rounds 3] [--steps 60]

Without Ray. All layouts share each batch as workers of a run do, with gradients summed by gloo. They train on images in
memory, in turns; and again while another process decodes as many images as they take, as those of Ray Data do. OpenMP's
threads wait for each other between operations: for a while in a loop (OpenMP's choice), always so (`active`), or asleep
(`passive`, which leaves the core to the decoder). Prints a table of images/s; the last line is JSON. Needs quiet cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/threads.py`

from mixmae.data.prepare import open_for_training
from mixmae.jobs.in_process import batches_of, build_seeded
from mixmae.jobs.pretraining import PretrainJob
from mixmae.machine import usable_cores
from mixmae.training.loop import Silent, TrainState, train
from mixmae.training.optim import build_optimizer
from pipelines.command import command
from pipelines.recipes import PRETRAIN_RECIPES

LOG_EVERY = 10
BATCHES = 4
"""Different ones, which are trained on again and again."""
WAIT_POLICIES = {"": {}, "active": {"OMP_WAIT_POLICY": "active"}, "passive": {"OMP_WAIT_POLICY": "passive"}}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    recipe: str = "demo"
    """Of pretraining."""
    rounds: int = 3
    """Turns of each layout."""
    steps: int = 60
    """Steps of a turn; the first third warms up."""


class _Rates(Silent):
    """Keeps the images per second of each log, and tells how far training is."""

    def __init__(self, finished: Any) -> None:
        self.rates: list[float] = []
        self._finished = finished

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[Any]) -> None:
        self.rates.append(record["images_per_s"])
        self._finished.value = step


def _train(job: PretrainJob, rank: int, num_workers: int, threads: int, store: str, finished: Any, result: Any) -> None:
    """A worker.   Args: finished: its finished steps.  result: of rank 0, images per second of each log."""
    torch.set_num_threads(threads)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_workers)
    share = job.share(rank=rank, num_workers=num_workers)
    batches = list(batches_of(job, BATCHES, share))
    bare = build_seeded(job)
    model: nn.Module = DistributedDataParallel(bare, gradient_as_bucket_view=True) if num_workers > 1 else bare
    events = _Rates(finished)
    train(
        model=model,
        optimizer=build_optimizer(bare, job.optim),
        peak_lr=job.optim.peak_lr(job.loop.batch_size),
        clip_grad_norm=job.optim.clip_grad_norm,
        step_function=job.step,
        batches=cycle(batches),
        share=share,
        state=TrainState(),
        config=job.loop,
        length=job.length,
        events=events,
        device=torch.device("cpu"),
    )
    if rank == 0:
        result.put(events.rates)
    if num_workers > 1:
        dist.destroy_process_group()


def _decode(job: PretrainJob, finished: Any) -> None:
    """Decode the images of as many batches as are trained on, and a few more."""
    torch.set_num_threads(1)
    for step, _ in enumerate(batches_of(job, job.length.total_steps)):
        while step > finished.value + 2 * LOG_EVERY:
            time.sleep(0.01)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def turn(job: PretrainJob, num_workers: int, policy: str, decoding: bool) -> float:
    """Images per second of one turn of a layout."""
    context, threads = get_context("spawn"), usable_cores() // num_workers
    finished, result = context.Value("l", 0, lock=False), context.Queue()
    with tempfile.TemporaryDirectory() as folder, _variables(WAIT_POLICIES[policy]):
        store = os.path.join(folder, "store")
        workers = [
            context.Process(target=_train, args=(job, rank, num_workers, threads, store, finished, result))
            for rank in range(num_workers)
        ]
        others = [context.Process(target=_decode, args=(job, finished), daemon=True)] if decoding else []
        for process in (*workers, *others):
            process.start()
        rates: list[float] = result.get(timeout=600)
        for process in workers:
            process.join()
        for process in others:
            process.terminate()
            process.join()
    return statistics.median(rates[len(rates) // 3 :])


def run(options: Arguments) -> int:
    """All layouts in turns, and the table.   Returns: the process's exit status."""
    cores = usable_cores()
    counts = [count for count in (1, cores) if cores % count == 0]
    layouts = [
        (count, policy) for count in dict.fromkeys(counts) for policy in (WAIT_POLICIES if count < cores else ("",))
    ]
    with tempfile.TemporaryDirectory() as base:
        source, heldout = open_for_training("moths", Path(base), 60)
        config = PRETRAIN_RECIPES[options.recipe]()
        loop = replace(config.loop, steps=options.steps, log_every_steps=LOG_EVERY)
        job = PretrainJob.of(replace(config, loop=loop), source, heldout, data="moths", folder=Path(base))
        rates: dict[tuple[int, str, bool], list[float]] = {}
        for _ in range(options.rounds):
            for count, policy in layouts:
                for decoding in (False, True):
                    rates.setdefault((count, policy, decoding), []).append(turn(job, count, policy, decoding))
    report: dict[str, Any] = {"load": round(os.getloadavg()[0], 1)}
    print("| layout | images/s | beside decoding |\n| --- | ---: | ---: |")
    for count, policy in layouts:
        name = f"{count} x {cores // count} threads{f', {policy}' if policy else ''}"
        alone, beside = (statistics.median(rates[count, policy, decoding]) for decoding in (False, True))
        print(f"| {name} | {alone:.0f} | {beside:.0f} |")
        report[name] = {"alone": round(alone, 1), "beside": round(beside, 1)}
    print(json.dumps(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="threads.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
