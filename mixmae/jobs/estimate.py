"""What a run will cost, from its config: memory by accounting, time by a card's roofline or by steps made here."""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.cost import Card, StepCost, measure_step
from mixmae.data.blocks import local_batches
from mixmae.data.order import Plan
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import PretrainConfig, RunConfig
from mixmae.machine import threads_per_process
from mixmae.methods.build import build_method
from mixmae.share import WorkerShare
from mixmae.training.optim import build_optimizer
from mixmae.training.recompute import recompute_stages
from mixmae.training.run_folder import PLAN_FILE
from mixmae.training.sharding import most_gathered

WARMUP_STEPS, MEASURED_STEPS, MEASURED_S = 2, 20, 10.0
"""Steps that are made before the clock runs; steps that are measured, or fewer when they take longer than seconds."""
DECODED_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a plan says of a run."""

    images_per_s: float
    """Of all workers, without evaluations and checkpoints."""
    bound: float | None
    """No run is faster; None where steps were measured."""
    memory: int
    """Bytes of a worker's step at its worst moment."""
    workers: int


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """Steps that were made in processes of their own."""

    step_s: float
    """Seconds of the slowest process's median step."""
    peak: int
    """Bytes that a process took, at the most, beyond `base`."""
    base: int
    """Bytes that it had before there was a model."""


def compared_with_plan(folder: Path, images_per_s: float) -> dict[str, float]:
    """What a run was planned to be and became, as metrics; nothing if there is no plan in its folder.

    Args: images_per_s: of the run.
    """
    try:
        planned = float(json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))["images_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"plan/images_per_s": planned, "plan/reached": images_per_s / planned}


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The model of a run: a pretraining method, or a classifier."""
    encoder = build_encoder(config.sized_encoder())
    model: nn.Module
    if isinstance(config, PretrainConfig):
        model = build_method(encoder, config.method)
    else:
        model = ImageClassifier(encoder, num_classes)
    recompute_stages(model, config.loop.recompute_stages)
    return model


def build_on_meta(config: RunConfig, num_classes: int) -> nn.Module:
    """The same without memory."""
    with torch.device("meta"):
        return build_model(config, num_classes)


def _loss(config: RunConfig, model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    """The loss of a step, on images that are normalised."""
    if isinstance(config, PretrainConfig):
        return model(images, generator=torch.Generator().manual_seed(0)).loss
    return F.cross_entropy(model(images).float(), torch.full((len(images), num_classes), 1 / num_classes))


def cost_of(config: RunConfig, images: int, num_classes: int, card: Card | None = None, workers: int = 1) -> StepCost:
    """Count what a micro-batch of a run costs.

    Args: card: where; None: on this machine's CPU.  workers: that may share out the model.
    """
    cost = measure_step(
        lambda: build_model(config, num_classes),
        lambda model: build_optimizer(model, config.optim),
        lambda model, batch: _loss(config, model, batch, num_classes),
        image_shape=(config.encoder.in_channels, *config.augment.size),
        images=images,
        precision=config.loop.precision,
        card=card,
    )
    return cost.sharded(workers, most_gathered(build_on_meta(config, num_classes))) if config.loop.shard else cost


def measure_steps(config: RunConfig, share: WorkerShare, num_classes: int) -> MeasuredSteps:
    """Make steps as all workers of a run on this machine's CPU make them at once, on images of noise."""
    with ProcessPoolExecutor(share.num_workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_make_steps, config, share, num_classes) for _ in range(share.num_workers)]
        measured = [job.result() for job in jobs]
    return max(measured, key=lambda steps: steps.step_s)


def _make_steps(config: RunConfig, share: WorkerShare, num_classes: int) -> MeasuredSteps:
    torch.set_num_threads(threads_per_process(share.num_workers))
    base = _peak_bytes(restart=True)
    model = build_model(config, num_classes)
    optimizer = build_optimizer(model, config.optim)
    images = torch.randint(256, (share.images, config.encoder.in_channels, *config.augment.size), dtype=torch.uint8)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.loop.precision == "bfloat16")
    seconds: list[float] = []
    while len(seconds) < WARMUP_STEPS + MEASURED_STEPS:
        start = time.perf_counter()
        for micro_batch in images.split(share.micro_batches):
            with autocast:
                loss = _loss(config, model, config.normalise(micro_batch), num_classes)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > WARMUP_STEPS + 1 and sum(seconds) > MEASURED_S:
            break
    return MeasuredSteps(step_s=statistics.median(seconds[WARMUP_STEPS:]), peak=_peak_bytes() - base, base=base)


def _peak_bytes(restart: bool = False) -> int:
    """The most memory that this process has had, since the last restart where the system is Linux."""
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if restart:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what there is now
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def decode_rate(config: RunConfig, source: Source) -> float:
    """Images per second that one core reads, decodes and crops, from the images that a run begins with."""
    share = WorkerShare(batch_size=32)
    plan = Plan(chunk_sizes=source.chunk_sizes, seed=0, window_rows=config.window_rows_for(source.exact_reads))
    channels, steps = config.encoder.in_channels, -(-DECODED_IMAGES // share.images)
    batches = local_batches(source, plan, config.augment, share=share, stop_step=1 + steps, channels=channels)
    next(batches)  # opens files
    start = time.thread_time()
    count = sum(len(batch.images) for batch in itertools.islice(batches, steps))
    return count / (time.thread_time() - start)
