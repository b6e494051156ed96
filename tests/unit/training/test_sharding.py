"""Two processes that share out one model: they compute what DDP does, and their checkpoints are the same files.

Needs gloo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixmae.encoders.build import build_encoder
from mixmae.jobs.config import PretrainConfig
from mixmae.methods.build import build_method
from mixmae.training.checkpoint import AVERAGE_FILE, MODEL_FILE, OPTIMIZER_FILE, load_checkpoint, verify
from mixmae.training.compile import compile_blocks
from mixmae.training.diverged import write_diverged
from mixmae.training.ema import WeightAverage
from mixmae.training.loop import Diverged, Silent, TrainState, step_seed, train
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.recompute import recompute_stages
from mixmae.training.saving import CheckpointWriter, give_parts
from mixmae.training.schedule import RunLength
from mixmae.training.sharding import shard, unsharded, whole
from tests.unit.training.test_loop_workers import BATCH, TINY

CPU = torch.device("cpu")
STEPS = 4
CONFIG = replace(
    TINY,
    encoder=replace(TINY.encoder, depths=(1, 2, 1, 1)),
    loop=replace(TINY.loop, micro_batch_size=2, checkpoint_every_epochs=0.02, log_every_steps=1, max_bad_steps=2),
    optim=OptimConfig(base_lr=0.05, clip_grad_norm=0.05, layer_decay=0.7),
)
UNCLIPPED = replace(CONFIG, optim=replace(CONFIG.optim, clip_grad_norm=None))
RECOMPUTING = replace(CONFIG, loop=replace(CONFIG.loop, recompute_stages=(2, 3)))


@dataclass
class Batch:
    images: torch.Tensor
    broken: tuple = ()


class Job:
    """What a kept step needs of one."""

    loop = CONFIG.loop

    def describe(self) -> dict[str, Any]:
        return {}


class Run(Silent):
    """A model with all that is trained with it, in float64; after each step it is saved, and rank 0 alone
    measures the loss of the average, as it draws a panel.

    Args: how: alone, ddp or sharded.  folder: of checkpoints; None: none are made.
    """

    def __init__(self, config: PretrainConfig, how: str, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        self.config, self.records, self.losses = config, [], []
        self.rank, self.num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.bare = build_method(build_encoder(config.sized_encoder()), config.method).double()
        self.how, self.gather = how, shard(self.bare, CPU) if how == "sharded" else unsharded(self.bare)
        recompute_stages(self.bare, config.loop.recompute_stages)
        self.optimizer = build_optimizer(self.bare, config.optim)
        self.average = WeightAverage(self.bare, 0.9)
        self.writer = None if folder is None else CheckpointWriter(folder, keep=None)
        self.state = TrainState()

    @property
    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
        return self.bare, self.optimizer, self.average

    def load(self, checkpoint: Path) -> None:
        model, optimizer, average = self.parts
        state = load_checkpoint(checkpoint, model=model, optimizer=optimizer, average=average)
        self.state = TrainState(**state["position"])

    def go(self, bad_steps: tuple[int, ...] = ()) -> Run:
        """Train to the end.   Args: bad_steps: those whose images are not finite on the last worker."""
        share = self.config.share(rank=self.rank, num_workers=self.num_workers)

        def batches():
            for step in range(self.state.step, STEPS):
                generator = torch.Generator().manual_seed(step_seed(1, "images", step))
                images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
                if step in bad_steps:
                    images[-1] = math.nan
                for index, size in enumerate(share.micro_batches):
                    first = share.first_sample(index)
                    yield Batch(images[first : first + size])

        train(
            model=DistributedDataParallel(self.bare) if self.how == "ddp" else self.bare,
            optimizer=self.optimizer,
            average=self.average,
            peak_lr=self.config.optim.peak_lr(BATCH),
            clip_grad_norm=self.config.optim.clip_grad_norm,
            step_function=lambda model, batch, generator, first: model(
                batch.images, generator=generator, first_sample=first
            ),
            batches=batches(),
            share=share,
            state=self.state,
            config=self.config.loop,
            length=RunLength(total_steps=STEPS, warmup_steps=0, steps_per_epoch=100),
            events=self,
            device=CPU,
        )
        return self

    def log(self, step, record, broken):
        self.records.append({name: record[name] for name in ("loss", "grad_norm", "skipped_steps")})
        if step == 1 and self.rank == 0 and self.writer:
            self.writer.reserve(*self.parts)

    def save(self, state):
        if self.writer and self.rank:
            give_parts(*self.parts)
        elif self.writer:
            model, optimizer, average = self.parts
            position = {"position": {"step": state.step, "images_seen": state.images_seen}}
            self.writer.save(step=state.step, model=model, optimizer=optimizer, average=average, state=position)
            self.writer.wait()
        if dist.is_initialized():
            dist.barrier()
        with self.average.applied_to(self.bare), self.gather() as model:
            if self.rank == 0:
                images = torch.ones(2, 3, 32, 32, dtype=torch.float64)
                self.losses.append(model(images, generator=torch.Generator().manual_seed(3)).loss.item())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(value).clone() for name, value in self.bare.state_dict().items()}


def compiled(model: nn.Module) -> list[Any]:
    """Compile as on a GPU, but with a backend that runs graphs as they are; the list that they will be in."""
    graphs, compiling = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with mock.patch.object(
        torch, "compile", lambda function, **options: compiling(function, backend=backend, **options)
    ):
        compile_blocks(model, torch.device("cuda"))
    return graphs


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out, results = Path(folder), {}

    def keep(name: str, run: Run) -> None:
        results[name] = {"weights": run.weights(), "records": run.records, "losses": run.losses}

    for how in ("ddp", "sharded"):
        keep(how, Run(CONFIG, how, out / how).go())
        keep(f"{how}, a bad step", Run(CONFIG, how).go(bad_steps=(1,)))
        keep(f"{how}, unclipped", Run(UNCLIPPED, how).go())
    continued = Run(CONFIG, "sharded")
    continued.load(out / "ddp/step_0000002")
    keep("continued", continued.go())
    moments = [state[name] for state in continued.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    parts = [*continued.bare.parameters(), *continued.average.state_dict()["averages"].values(), *moments]
    results["bytes"] = {
        "here": sum(part.to_local().untyped_storage().nbytes() for part in parts),
        "whole": sum(part.numel() * part.element_size() for part in parts),
    }
    keep("recomputed", Run(RECOMPUTING, "sharded").go())
    compiling = Run(CONFIG, "sharded")
    graphs = compiled(compiling.bare)
    keep("compiled", compiling.go())
    results["graphs"] = len(graphs)
    diverged = Run(CONFIG, "sharded")
    with pytest.raises(Diverged) as raised:
        diverged.go(bad_steps=(1, 2))
    write_diverged(out / f"kept{rank}", job=Job(), model=diverged.bare, bad=raised.value)
    diverged.load(out / "sharded/step_0000002")  # as a run goes back
    keep("went back", diverged.go())
    torch.save(results, out / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the checkpoints, and what each process found."""
    folder = tmp_path_factory.mktemp("sharding")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def close(one: Any, two: Any) -> None:
    """Nested values agree up to the order of additions."""
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.timeout(200)
def test_steps_are_those_of_ddp(runs):
    """With accumulation, clipping, layer decay and an average; a step that is not finite is left out by all workers."""
    for found in runs[1]:
        assert [record["skipped_steps"] for record in found["sharded, a bad step"]["records"]] == [0, 1, 1, 1]
        for name in ("", ", a bad step", ", unclipped"):
            close(found[f"sharded{name}"], found[f"ddp{name}"])
        close(found["recomputed"], found["ddp"])
        close(found["compiled"], found["ddp"])
        assert found["graphs"] == len(CONFIG.encoder.depths)  # one for each stage, as without sharding


def test_each_worker_holds_its_part(runs):
    for found in runs[1]:
        assert found["bytes"]["here"] == pytest.approx(found["bytes"]["whole"] / 2, rel=0.05)


@pytest.mark.parametrize("step", [2, 4])
def test_checkpoints_are_the_same_files(runs, step):
    ddp, sharded = (runs[0] / how / f"step_{step:07d}" for how in ("ddp", "sharded"))
    verify(sharded)
    assert sorted(file.name for file in sharded.iterdir()) == sorted(file.name for file in ddp.iterdir())
    close(load_file(sharded / MODEL_FILE), load_file(ddp / MODEL_FILE))
    for name in (OPTIMIZER_FILE, AVERAGE_FILE):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (sharded, ddp))
        assert one.pop("param_groups", None) == two.pop("param_groups", None)
        close(one, two)


def test_any_number_of_workers_continues_them(runs):
    folder, found = runs
    alone = Run(CONFIG, "alone")
    alone.load(folder / "sharded/step_0000002")
    alone.go()
    close(alone.weights(), found[0]["sharded"]["weights"])
    assert alone.losses == pytest.approx(found[0]["sharded"]["losses"][2:])
    close(found[0]["continued"]["weights"], found[0]["ddp"]["weights"])


def test_a_run_that_diverges_goes_back_and_keeps_the_step(runs):
    folder, found = runs
    close(found[0]["went back"]["weights"], found[0]["ddp"]["weights"])
    close(load_file(folder / "kept0" / MODEL_FILE), load_file(folder / "ddp/step_0000001" / MODEL_FILE))
