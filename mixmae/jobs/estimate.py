"""What a run will cost, from its config: memory by accounting, time by a card's roofline or by steps made here."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.cost import Card, StepCost, measure_step
from mixmae.data.blocks import local_batches
from mixmae.data.order import Plan
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.flops import count_macs
from mixmae.jobs.config import DetectConfig, PretrainConfig, RunConfig, SegmentConfig
from mixmae.jobs.full_detector import FullDetector, FullForward, full_loss
from mixmae.machine import keep_freed_memory, threads_per_process
from mixmae.methods.build import build_method
from mixmae.segmentation.step import segmentation_step
from mixmae.segmentation.upernet import UPerNet
from mixmae.share import WorkerShare
from mixmae.training.optim import build_optimizer
from mixmae.training.recompute import recompute_stages
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


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The model of a run: a pretraining method, a classifier, a UPerNet, or a detector with all regions."""
    encoder = build_encoder(config.sized_encoder())
    model: nn.Module
    if isinstance(config, PretrainConfig):
        model = build_method(encoder, config.method)
    elif isinstance(config, SegmentConfig):
        model = UPerNet(encoder, num_classes, config.head)
    elif isinstance(config, DetectConfig):
        model = FullDetector(encoder, num_classes, config.detector)
    else:
        model = ImageClassifier(encoder, num_classes)
    recompute_stages(model, config.loop.recompute_stages)
    return model


def build_on_meta(config: RunConfig, num_classes: int) -> nn.Module:
    """The same without memory."""
    with torch.device("meta"):
        return build_model(config, num_classes)


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: all weights, and AdamW's two moments of those that are trained."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return weights + sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def forward_macs(config: RunConfig, num_classes: int) -> int:
    """MACs per image of a training step's forward."""
    model = build_on_meta(config, num_classes)
    inputs: dict[str, Any] = {}
    if isinstance(config, PretrainConfig):
        inputs = {"generator": torch.Generator()}
    elif isinstance(config, SegmentConfig):
        inputs = {"with_auxiliary": True}
    elif isinstance(config, DetectConfig):
        assert isinstance(model, FullDetector)
        model = FullForward(model)
    size, channels, unit = config.augment.image_size, config.encoder.in_channels, micro_batch_unit(config)
    return count_macs(model, size, in_channels=channels, num_images=unit, **inputs).total


def micro_batch_unit(config: RunConfig) -> int:
    """The fewest images of a micro-batch; all micro-batches are multiples of it."""
    if isinstance(config, PretrainConfig):
        return config.method.images_mixed
    # UPerNet pools to a single point, which a batch norm needs two of.
    return 2 if isinstance(config, SegmentConfig) and config.head.norm == "batch" else 1


def loss_of(config: RunConfig, model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    """The loss of a step, on images that are normalised."""
    if isinstance(config, PretrainConfig):
        return model(images, generator=torch.Generator().manual_seed(0)).loss
    if isinstance(config, SegmentConfig):
        targets = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
        return segmentation_step(model, images, targets, aux_weight=config.head.aux_weight).loss
    if isinstance(config, DetectConfig):
        return full_loss(model, images)
    return F.cross_entropy(model(images).float(), torch.full((len(images), num_classes), 1 / num_classes))


def cost_of(config: RunConfig, images: int, num_classes: int, card: Card | None = None, workers: int = 1) -> StepCost:
    """Count what a micro-batch of a run costs.

    Args: card: where; None: on this machine's CPU.  workers: that may share out the model.
    """
    cost = measure_step(
        lambda: build_model(config, num_classes),
        lambda model: build_optimizer(model, config.optim),
        lambda model, batch: loss_of(config, model, batch, num_classes),
        image_shape=(config.encoder.in_channels, *config.augment.size),
        images=images,
        precision=config.loop.precision,
        card=card,
        floats_have_values=isinstance(config, DetectConfig),
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
    keep_freed_memory()  # as a run does
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
                loss = loss_of(config, model, config.normalise(micro_batch), num_classes)
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
