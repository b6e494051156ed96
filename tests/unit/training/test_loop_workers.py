"""The loop in several processes whose shares of a batch differ: they compute what one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import SwinConfig
from mixmae.jobs.config import PretrainConfig
from mixmae.methods.build import build_method
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.training.loop import LoopConfig, Silent, TrainState, step_seed, train
from mixmae.training.schedule import RunLength
from mixmae.training.sharding import shard, whole

KINDS = ("", "sharded", "norm")
"""Distributed data parallelism, sharding, and the first with a norm over all workers."""
STEPS = 3
BATCH = 8
SWIN = SwinConfig(image_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_sizes=(4, 4, 2, 1))
TINY = PretrainConfig(
    encoder=replace(SWIN, patch_px=2),
    method=MixMAEConfig(num_images=2, decoder=DecoderConfig(dim=16, depth=1, num_heads=2)),
    loop=LoopConfig(batch_size=BATCH, epochs=1, warmup_epochs=0, log_every_steps=STEPS),
)
TINY = replace(TINY, augment=replace(TINY.augment, image_size=32))


class Together(nn.SyncBatchNorm):
    """Waits for all workers in each pass, as it does on GPUs, and changes nothing."""

    def forward(self, input):
        dist.all_reduce(torch.zeros(1))
        return input


class WithNorm(nn.Module):
    """A model and a norm over all workers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm = model, Together(3, affine=False)

    def forward(self, images, **draws):
        return self.model(self.norm(images), **draws)


class Logs(Silent):
    """Keeps the records, and what a checkpoint between them has of the averages."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self.pending: dict[str, Any] = {}

    def log(self, step, record, broken):
        self.records.append({name: record[name] for name in ("loss", "grad_norm", "first")})

    def save(self, state):
        self.pending = self.pending or dict(state.pending.get("averages", {}))


def run(config: PretrainConfig, *, rank: int = 0, num_workers: int = 1, kind: str = "") -> dict[str, Any]:
    """The weights after some steps in float64, and what was logged.   Args: kind: one of KINDS."""
    torch.manual_seed(0)
    bare = build_method(build_encoder(config.sized_encoder()), config.method).double()
    model: nn.Module = WithNorm(bare) if kind == "norm" else bare
    if kind == "sharded":
        shard(bare, torch.device("cpu"))
    elif num_workers > 1:
        with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):  # it wants GPUs
            model = DistributedDataParallel(model)
    share = config.share(rank=rank, num_workers=num_workers)

    def batches():
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step_seed(1, "images", step))
            images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
            for index, size in enumerate(share.micro_batches):
                first = share.first_sample(index)
                yield SimpleNamespace(images=images[first : first + size], broken=())

    def step(model, batch, generator, first_sample):
        output = model(batch.images, generator=generator, first_sample=first_sample)
        return replace(output, metrics={"first": batch.images[:, 0, 0, 0].mean()})

    events = Logs()
    train(
        model=model,
        optimizer=torch.optim.SGD(bare.parameters()),  # Adam would make much of the rounding of small gradients
        peak_lr=1.0,
        clip_grad_norm=1.0,
        step_function=step,
        batches=batches(),
        share=share,
        state=TrainState(),
        config=config.loop,
        length=RunLength(total_steps=STEPS, warmup_steps=0, steps_per_epoch=100),
        events=events,
        device=torch.device("cpu"),
    )
    weights = {name: whole(value) for name, value in bare.state_dict().items()}
    return {"weights": weights, "records": events.records, "pending": events.pending}


def worker(rank: int, num_workers: int, folder: str, configs: dict[str, PretrainConfig]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_workers)
    for name, config in configs.items():
        for kind in KINDS:
            result = run(config, rank=rank, num_workers=num_workers, kind=kind)
            if rank == num_workers - 1:
                torch.save(result, f"{folder}/{name}{kind}.pt")
    dist.destroy_process_group()


def loop(micro_batch_size: int | None) -> LoopConfig:
    return replace(TINY.loop, micro_batch_size=micro_batch_size)


CONFIGS = {
    "whole shares": TINY,  # of 3 workers: 2, 2 and 4 images
    "micro-batches": replace(TINY, loop=loop(2)),  # 1, 1 and 2 of them
    "dropped paths": replace(TINY, encoder=replace(TINY.encoder, drop_path=0.3), loop=loop(2)),
    "a map per mix": replace(TINY, method=replace(TINY.method, group_map_per="sample"), loop=loop(4)),
}


@pytest.mark.parametrize("num_workers", [3])
@pytest.mark.timeout(200)
def test_workers_with_unequal_shares_compute_what_one_does(tmp_path: Path, num_workers: int) -> None:
    mp.spawn(worker, (num_workers, str(tmp_path), CONFIGS), nprocs=num_workers)
    results = {name: run(config) for name, config in CONFIGS.items()}
    for name, alone in [(f"{name}{kind}", alone) for name, alone in results.items() for kind in KINDS]:
        found = torch.load(tmp_path / f"{name}.pt")
        for key, value in alone["weights"].items():  # the loss is in float32
            torch.testing.assert_close(
                found["weights"][key], value, rtol=0, atol=3e-7, msg=lambda text, at=(name, key): f"{at}: {text}"
            )
        assert len(alone["records"]) == len(found["records"]) == 2
        for other, record in zip(found["records"], alone["records"], strict=True):
            assert other == pytest.approx(record, rel=1e-6), name
        assert {key: num_images for key, (_, num_images) in found["pending"].items()} == dict.fromkeys(
            ("first", "grad_norm", "loss"), BATCH
        )
        for key, (total, _) in alone["pending"].items():
            assert found["pending"][key][0] == pytest.approx(total, rel=1e-6), (name, key)
