"""The training loop, in the order things happen: fetch, schedule, forward, backward, clip, step, average, log, save.

Plain torch: it runs in any process, alone or as one worker of an initialised torch.distributed group, and knows neither
Ray nor MLflow nor which task it trains. Every draw is a function of (seed, step), so a resumed run continues bit for
bit, and the number of workers does not change what is computed, up to the order of float additions.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixmae.share import WorkerShare
from mixmae.step import StepOutput
from mixmae.training.ema import WeightAverage
from mixmae.training.failures import TrainingStopped
from mixmae.training.schedule import RunLength, learning_rate


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, batch and bookkeeping of a run; the defaults are the paper's (table 11)."""

    epochs: float = 600
    """Passes over the training set."""
    warmup_epochs: float = 40
    """Epochs of linear warmup, part of `epochs`."""
    steps: int | None = None
    """Length in optimiser steps instead of epochs; the warmup keeps its share of the run."""
    batch_size: int = 1024
    """Global batch: images per optimiser step, over all workers and micro-batches."""
    micro_batch_size: int | None = None
    """Images that a worker puts through the model at once; None is its whole share of the batch (no accumulation)."""
    seed: int = 0
    """Seed of initialisation, data order, crops and group maps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (autocast); weights and optimiser stay float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every_steps: int = 20
    """Steps between progress lines, and between the points of the curves."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations; at least four per run."""
    checkpoint_every_epochs: float = 1.0
    """Epochs between checkpoints; at least four per run."""
    max_broken_fraction: float = 0.01
    """Share of images that may fail to decode before the run stops; judged after 1,000 images, or one epoch of a
    smaller set. Where hardly any image decodes, a run stops after 64 images."""
    max_loss: float | None = None
    """Stop as diverged when the mean loss since the last log is above it; None: only on NaN or infinity."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "log_every_steps", "evaluate_every_epochs", "checkpoint_every_epochs")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}: it must lie between 0 and epochs ({self.epochs})."
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1, or None to count in epochs.")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction is {self.max_broken_fraction}: it must lie between 0 and 1.")

    def is_hopeless(self, broken: int, seen: int) -> bool:
        """Whether so many of the images seen are broken that the set must be another one than was meant: all of them,
        or more than halfway from `max_broken_fraction` to all."""
        return seen > 0 and (broken == seen or broken / seen > (1 + self.max_broken_fraction) / 2)

    def share(self, *, num_workers: int, rank: int = 0) -> WorkerShare:
        """One worker's part of every batch.   Raises: ValueError if the batch cannot be cut so."""
        return WorkerShare(
            batch_size=self.batch_size, micro_batch_size=self.micro_batch_size, rank=rank, num_workers=num_workers
        )


EARLY_IMAGES = 64
"""Images after which a run of broken ones is stopped."""


class BrokenImage(Protocol):
    """An image that could not be decoded."""

    row: int
    where: str
    reason: str


class Batch(Protocol):
    """One worker's micro-batch as the data plane hands it over."""

    @property
    def images(self) -> Tensor:
        """uint8 (B, C, H, W), on the CPU."""

    @property
    def broken(self) -> Sequence[Any]:
        """The BrokenImage records met while making it."""


class Events(Protocol):
    """What the loop tells its surroundings. Every worker calls every method at the same steps."""

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[BrokenImage]) -> None:
        """Progress after `step` finished steps: averages since the last call, and images newly found broken."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Evaluate after `step` finished steps; returns the metrics, if any. The model may be left in eval mode."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint."""


@dataclass(kw_only=True)
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimiser."""

    step: int = 0
    """Finished optimiser steps."""
    images_seen: int = 0
    """The position in the data order: global batch x step."""
    broken_images: int = 0
    """Images that could not be decoded so far, repeats in later epochs included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last logged averages, and the metrics of the last evaluation."""
    references: dict[str, float] = field(default_factory=dict)
    """What was measured before the first step for later evaluations to be compared with, under reference/."""


StepFunction = Callable[[nn.Module, Any, torch.Generator, int], StepOutput]
"""(model, batch on the device, generator of the step, index of the batch's first image in the global batch)."""


def step_seed(seed: int, *keys: int | str) -> int:
    """A seed for torch that depends on all keys and on nothing else, now and in later versions."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def train(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    peak_lr: float,
    clip_grad_norm: float | None,
    step_function: StepFunction,
    batches: Iterator[Batch],
    state: TrainState,
    config: LoopConfig,
    length: RunLength,
    events: Events,
    device: torch.device,
) -> TrainState:
    """Run the steps from `state.step` to the end of the run.

    Args:
        model: the module to train, wrapped by DistributedDataParallel when there are several workers.
        optimizer: over the model's parameters; each group's rate is the schedule's times its "lr_scale", if it has one.
        average: of the bare model's weights, updated after each step; None: no average.
        peak_lr: learning rate at the end of the warmup.
        clip_grad_norm: largest norm of the whole gradient; None: it is not clipped.
        step_function: runs the task's forward on one micro-batch.
        batches: this worker's micro-batches from step `state.step` on, `accumulation` of its share for each step.
        state: updated in place.
        config: batch, seed, precision and how often to log, evaluate and save.
        length: steps of the run and of its warmup.
        events: told of progress; it evaluates and saves.
        device: where the model is.
    Returns: the state after the last step.
    Raises: TrainingStopped, on all workers alike, if the loss or the gradient is not finite, the loss is above
        config.max_loss, or too many images are broken: hardly any of the first EARLY_IMAGES decodes, or of a run that
        is shorter, or more than config.max_broken_fraction are broken.
    """
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = config.share(num_workers=num_workers, rank=rank)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    evaluate_every = length.every(config.evaluate_every_epochs)
    checkpoint_every = length.every(config.checkpoint_every_epochs)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")

    averages = _Averages(device)
    broken: list[BrokenImage] = []
    # From where this process trains on: images that were whole before may have gone since.
    first_step, broken_before = state.step, state.broken_images
    early_step = first_step + math.ceil(EARLY_IMAGES / config.batch_size)
    since_log, wait_s, logged_at_step = time.perf_counter(), 0.0, state.step
    model.train()
    while state.step < length.total_steps:
        lr = learning_rate(state.step, peak=peak_lr, length=length)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for index in range(share.accumulation):
            fetch_start = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - fetch_start
            broken.extend(batch.broken)

            # The same generator for all micro-batches and workers: they share the step's group map.
            generator = torch.Generator().manual_seed(step_seed(config.seed, "step", state.step))
            first_sample = share.first_sample(index)
            # Drop path and the like draw from the global generator: make it a function of the images' index too.
            torch.manual_seed(step_seed(config.seed, "modules", state.step, first_sample))
            last = index == share.accumulation - 1
            with contextlib.ExitStack() as stack:
                if isinstance(model, DistributedDataParallel) and not last:
                    stack.enter_context(model.no_sync())  # gradients are summed once per step, with the last
                with autocast:
                    output = step_function(model, batch, generator, first_sample)
                (output.loss / share.accumulation).backward()
            averages.add({"loss": output.loss.detach(), **output.metrics})

        norm = _clip(model, clip_grad_norm)
        averages.add({"grad_norm": norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(bare)
        state.step += 1
        state.images_seen = state.step * config.batch_size
        finished = state.step == length.total_steps

        seen = (state.step - first_step) * config.batch_size
        logs = state.step % config.log_every_steps == 0 or finished or state.step == 1
        if state.step == early_step and not logs:
            logs = config.is_hopeless(state.broken_images - broken_before + len(gather(broken)), seen)
        if logs:
            record = averages.reduce()
            found = gather(broken)
            now = time.perf_counter()
            steps, seconds = state.step - logged_at_step, now - since_log
            record |= {
                "lr": lr,
                "epoch": state.step / length.steps_per_epoch,
                "images_per_s": steps * config.batch_size / seconds,
                "data_wait_share": _mean(wait_s / seconds, device),
                "step_s": seconds / steps,
            }
            state.broken_images += len(found)
            record["broken_images"] = state.broken_images
            state.metrics = record
            events.log(state.step, record, found)
            example = f", for example {found[0].where}: {found[0].reason}" if found else ""
            if seen >= EARLY_IMAGES or (finished and first_step == 0):
                _refuse_hopeless(state.broken_images - broken_before, seen, config, example)
            _refuse_bad_progress(state, config, length, example)
            broken = []
            since_log, wait_s, logged_at_step = time.perf_counter(), 0.0, state.step

        pause_start = time.perf_counter()
        if state.step % evaluate_every == 0 or finished:
            state.metrics |= events.evaluate(state.step)
            model.train()
        if state.step % checkpoint_every == 0 or finished:
            _refuse_bad_weights(norm, state.step)
            events.save(state)
        since_log += time.perf_counter() - pause_start  # throughput is of training, not of evaluating and saving
    return state


def _clip(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the gradient if asked; returns its norm before clipping."""
    return nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)


DIVERGED = (
    "the run has diverged. Lower --optim.base-lr, lengthen --loop.warmup-epochs or set --optim.clip-grad-norm, and "
    "start from an older checkpoint or anew."
)


def _refuse_bad_weights(norm: Tensor, step: int) -> None:
    """Stop before weights that are not finite are saved: a gradient that is not finite makes them so, for good.

    Args: norm: of the last step's gradient, the same on all workers.
    """
    if not norm.isfinite():
        raise TrainingStopped(f"The norm of the gradient is {norm.item()} at step {step}: {DIVERGED}")


def _refuse_hopeless(broken: int, seen: int, config: LoopConfig, example: str) -> None:
    """Stop a run that reads next to nothing but broken images. All inputs are the same on every worker."""
    if config.is_hopeless(broken, seen):
        raise TrainingStopped(
            f"{broken} of the first {seen} images could not be decoded{example}; the set cannot be trained on: look "
            "at it with pipelines/stats.py, which names the broken images, and repair it or choose another --data."
        )


def _refuse_bad_progress(state: TrainState, config: LoopConfig, length: RunLength, example: str) -> None:
    """Stop a run that has diverged or that mostly sees substitutes. All inputs are the same on every worker."""
    loss = state.metrics["loss"]
    largest = float("inf") if config.max_loss is None else config.max_loss
    if loss != loss or abs(loss) == float("inf") or loss > largest:
        raise TrainingStopped(f"The loss is {loss} at step {state.step}: {DIVERGED}")
    # Wait for enough images to judge: a thousand, or one epoch of a smaller set.
    enough = state.images_seen >= min(1000, length.steps_per_epoch * config.batch_size)
    fraction = state.broken_images / state.images_seen
    if enough and fraction > config.max_broken_fraction:
        raise TrainingStopped(
            f"{state.broken_images} of {state.images_seen} images could not be decoded ({fraction:.1%}, more than "
            f"{config.max_broken_fraction:.1%}{example}): look at the ledger of broken images, repair the data set, or "
            "raise --loop.max-broken-fraction."
        )


class _Averages:
    """Sums of scalars on the device; nothing is copied to the CPU before `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            total = self._sums.get(name)
            self._sums[name] = value.detach().double() if total is None else total + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def reduce(self) -> dict[str, float]:
        """Means over steps and workers; the sums start anew."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].to(self._device) / self._counts[name] for name in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))


def _mean(value: float, device: torch.device) -> float:
    """The mean of a number over all workers."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def gather(items: list[BrokenImage]) -> list[BrokenImage]:
    """The items of all workers, on every worker."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(items)
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
