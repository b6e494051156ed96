"""The training loop, in the order things happen: fetch, schedule, forward, backward, clip, step, average, log, save.

Plain torch: it runs in any process, alone or as one worker of an initialised torch.distributed group, and knows neither
Ray nor MLflow nor which task it trains. Every draw is a function of (seed, step) and of an image's place in the batch,
so a resumed run continues bit for bit, and the number of workers does not change what is computed, up to the order of
float additions; workers whose shares differ count by their images. On a GPU bits need `deterministic`: the backward
pass of fused attention with a mask adds in no fixed order.
"""

from __future__ import annotations

import contextlib
import gc
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

from mixmae.machine import keep_freed_memory
from mixmae.share import WorkerShare
from mixmae.step import StepOutput
from mixmae.training.ema import WeightAverage
from mixmae.training.failures import TrainingStopped
from mixmae.training.schedule import RunLength, Schedule, learning_rate
from mixmae.training.sharding import is_sharded, whole


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, batch and bookkeeping of a run; the defaults are the paper's (table 11)."""

    epochs: float = 600
    """Passes over the training set."""
    warmup_epochs: float = 40
    """Epochs of linear warmup, part of `epochs`."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after it."""
    steps: int | None = None
    """Length in optimiser steps instead of epochs; the warmup keeps its share of the run."""
    batch_size: int = 1024
    """Global batch: images per optimiser step, over all workers and micro-batches."""
    micro_batch_size: int | None = None
    """Images that a worker puts through the model at once, at most; None: its whole share of the batch (no
    accumulation)."""
    seed: int = 0
    """Seed of initialisation, data order, crops and group maps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (autocast); weights and optimiser stay float32."""
    compile: bool = False
    """On a GPU, compile the blocks of the model with torch.compile. On a CPU it changes nothing."""
    recompute_stages: tuple[int, ...] = ()
    """Stages of the encoder, counted from 1, whose blocks keep only their input and are computed again for the backward
    pass: less memory, and up to a third more time for these stages. A plain ViT is one stage."""
    shard: bool = False
    """Share out weights, gradients and the optimiser's state among the workers instead of a copy for each: for models
    that do not fit into a GPU otherwise. Each step sends more. With one worker it changes nothing."""
    deterministic: bool = False
    """Use only operations that give the same bits each time, as a CPU does anyway. Slower on a GPU; an operation that
    has no such form stops the run."""
    log_every_steps: int = 20
    """Steps between progress lines, and between the points of the curves."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations; at least four per run."""
    checkpoint_every_epochs: float = 1.0
    """Epochs between checkpoints; at least four per run."""
    checkpoint_every_minutes: float | None = 30
    """Minutes after which a log step makes a checkpoint, too; None: only epochs count."""
    max_broken_fraction: float = 0.01
    """Share of images that may fail to decode before the run stops; judged after 1,000 images, or one epoch of a
    smaller set. Where hardly any image decodes, a run stops after 64 images."""
    max_loss: float | None = None
    """Stop as diverged when the mean loss since the last log is above it; None: only on NaN or infinity."""
    max_bad_steps: int = 10
    """A step whose gradient is not finite is left out and counted. After so many in a row the run goes back to its last
    checkpoint; the second time at the same step it stops."""

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
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}: it must be at least 1, or None.")
        if self.checkpoint_every_minutes is not None and not self.checkpoint_every_minutes > 0:
            raise ValueError(
                f"checkpoint_every_minutes is {self.checkpoint_every_minutes}: it must be above 0, or None."
            )
        if self.max_bad_steps < 1:
            raise ValueError(f"max_bad_steps is {self.max_bad_steps}: it must be at least 1.")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction is {self.max_broken_fraction}: it must lie between 0 and 1.")

    def is_hopeless(self, broken: int, seen: int) -> bool:
        """Whether so many of the images seen are broken that the set must be another one than was meant: all of them,
        or more than halfway from `max_broken_fraction` to all."""
        return seen > 0 and (broken == seen or broken / seen > (1 + self.max_broken_fraction) / 2)


EARLY_IMAGES = 64
"""Images after which a run of broken ones is stopped."""


class BrokenImage(Protocol):
    """An image that could not be used."""

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

    def asked(self, step: int) -> Literal["", "save", "stop"]:
        """What somebody asks for after `step` finished steps, the same on every worker: a checkpoint, or one and the
        end."""

    def beat(self) -> None:
        """A sign of life: a batch has come, or a step is done."""


class Silent:
    """Events of which nothing comes: the base of those that need only some."""

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[BrokenImage]) -> None: ...
    def evaluate(self, step: int) -> Mapping[str, float]:
        return {}

    def save(self, state: TrainState) -> None: ...
    def asked(self, step: int) -> Literal["", "save", "stop"]:
        return ""

    def beat(self) -> None: ...


@dataclass(kw_only=True)
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimiser."""

    step: int = 0
    """Finished optimiser steps."""
    images_seen: int = 0
    """The position in the data order: global batch x step."""
    broken_images: int = 0
    """Images that could not be used so far, repeats in later epochs included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last logged averages, and the metrics of the last evaluation."""
    references: dict[str, float] = field(default_factory=dict)
    """What was measured before the first step for later evaluations to be compared with, under reference/."""
    skipped_steps: int = 0
    """Steps that were left out so far, because their gradient was not finite."""
    pending: dict[str, Any] = field(default_factory=dict)
    """What was counted since the last log: sums and counts of all workers, and broken images."""


StepFunction = Callable[[nn.Module, Any, torch.Generator, int], StepOutput]
"""(model, batch on the device, generator of the step, index of the batch's first image in the global batch)."""


def step_seed(seed: int, *keys: int | str) -> int:
    """A seed for torch that depends on all keys and on nothing else, now and in later versions."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Spare Python's garbage collector what is there by now: it would look through all of it again and again, which
    takes 3 % of a small model's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_settled()
def train(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    peak_lr: float,
    clip_grad_norm: float | None,
    step_function: StepFunction,
    batches: Iterator[Batch],
    share: WorkerShare | None = None,
    state: TrainState,
    config: LoopConfig,
    length: RunLength,
    events: Events,
    device: torch.device,
) -> TrainState:
    """Run the steps from `state.step` to the end of the run.

    Args:
        model: the module to train; when there are several workers, wrapped by DistributedDataParallel or sharded.
        optimizer: over the model's parameters; each group's rate is the schedule's times its "lr_scale", if it has one.
        average: of the bare model's weights, updated after each step; None: no average.
        peak_lr: learning rate at the end of the warmup.
        clip_grad_norm: largest norm of the whole gradient; None: it is not clipped.
        step_function: runs the task's forward on one micro-batch.
        batches: this worker's micro-batches from step `state.step` on, as its share cuts them.
        share: which images of each batch are this worker's; None: all of them, where there is one.
        state: updated in place.
        config: batch, seed, precision and how often to log, evaluate and save.
        length: steps of the run and of its warmup.
        events: told of progress; it evaluates and saves.
        device: where the model is.
    Returns: the state after the last step, or where `events` asked for the end.
    Raises: TrainingStopped, on all workers alike, if the loss is above config.max_loss, or too many images are broken:
        hardly any of the first EARLY_IMAGES decodes, or of a run that is shorter, or more than
        config.max_broken_fraction are broken. Diverged, likewise, after config.max_bad_steps steps in a row whose
        gradient is not finite.
    """
    share = share or WorkerShare(batch_size=config.batch_size, micro_batch_size=config.micro_batch_size)
    if device.type == "cpu":
        keep_freed_memory()
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert (share.batch_size, share.rank, share.num_workers) == (config.batch_size, rank, num_workers)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    evaluate_every = length.every(config.evaluate_every_epochs)
    checkpoint_every = length.every(config.checkpoint_every_epochs)
    # All workers gather weights that are shared out, or sum statistics of batch norms, together: who has fewer
    # micro-batches takes part in vain.
    together = is_sharded(model) or any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    passes = share.most_micro_batches if together else share.accumulation
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")

    averages = _Averages(device, state.pending.get("averages"))
    broken: list[BrokenImage] = [Broken(**item) for item in state.pending.get("broken", ()) if rank == 0]
    state.pending = {}
    health = _Health(device)
    # From where this process trains on: images that were whole before may have gone since.
    first_step, saved_step, broken_before = state.step, state.step, state.broken_images
    early_step = first_step + math.ceil(EARLY_IMAGES / config.batch_size)
    since_log, wait_s, logged_at_step, saved_at = time.perf_counter(), 0.0, state.step, time.monotonic()
    model.train()
    while state.step < length.total_steps:
        asked = events.asked(state.step) if state.step > first_step else ""
        if asked and saved_step != state.step:
            state.pending = {"averages": averages.state(), "broken": _as_dicts(gather(broken))}
            events.save(state)
            saved_step, saved_at = state.step, time.monotonic()
        if asked == "stop":
            return state
        lr = learning_rate(state.step, peak=peak_lr, length=length, schedule=config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for index in range(passes):
            counts = index < share.accumulation
            if counts:  # else the last one goes through the model again, and its loss counts for nothing
                fetch_start = time.perf_counter()
                batch = next(batches)
                wait_s += time.perf_counter() - fetch_start
                broken.extend(batch.broken)
                first_sample = share.first_sample(index)
            events.beat()

            # The same generator for all micro-batches and workers: they share the step's group map.
            generator = torch.Generator().manual_seed(step_seed(config.seed, "step", state.step))
            # Drop path and the like draw from the global generator: make it a function of the images' index too.
            torch.manual_seed(step_seed(config.seed, "modules", state.step, first_sample))
            last = index == passes - 1
            with contextlib.ExitStack() as stack:
                if isinstance(model, DistributedDataParallel) and not last:
                    stack.enter_context(model.no_sync())  # gradients are summed once per step, with the last
                with autocast:
                    output = step_function(model, batch, generator, first_sample)
                (output.loss / share.divisor(index) if counts else 0 * output.loss).backward()
            if counts:
                averages.add({"loss": output.loss.detach(), **output.metrics}, share.micro_batches[index])

        norm = _clip(model, clip_grad_norm)
        averages.add({"grad_norm": norm}, share.images)
        health.update(norm)
        health.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        events.beat()
        if average is not None:
            average.update(bare)
        state.step += 1
        state.images_seen = state.step * config.batch_size
        finished = state.step == length.total_steps

        seen = (state.step - first_step) * config.batch_size
        logs = state.step % config.log_every_steps == 0 or finished or state.step == 1
        if device.type == "cpu" or logs:  # on a GPU the host would wait for the step
            health.refuse(config.max_bad_steps, state.step, batch, first_sample)
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
            state.skipped_steps += health.take_skipped()
            record |= {"broken_images": state.broken_images, "skipped_steps": state.skipped_steps}
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
        is_late = logs and _is_late(config.checkpoint_every_minutes, saved_at, device)
        if state.step % checkpoint_every == 0 or is_late or finished:
            state.pending = {} if logs else {"averages": averages.state(), "broken": _as_dicts(gather(broken))}
            events.save(state)
            saved_step, saved_at = state.step, time.monotonic()
        since_log += time.perf_counter() - pause_start  # throughput is of training, not of evaluating and saving
    return state


def _clip(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the gradient if asked; returns its norm before clipping."""
    if max_norm is None:  # clipping to infinity would read and write every gradient to change nothing
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return whole(nn.utils.get_total_norm(gradients))
    return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))


DIVERGED = (
    "the run has diverged. Lower --optim.base-lr, lengthen --loop.warmup-epochs or set --optim.clip-grad-norm, and "
    "go back to an older checkpoint (--from-step) or start anew."
)


class Diverged(RuntimeError):
    """The gradient was not finite for several steps in a row; the weights are those before the first of them."""

    def __init__(self, first_step: int, step: int, batch: Batch, first_sample: int) -> None:
        """Args: first_step, step: finished steps before the first bad step and after the last.
        batch, first_sample: this worker's last micro-batch, and the index of its first image in the global batch.
        """
        super().__init__(f"The gradient was not finite in the steps {first_step + 1} to {step}")
        self.first_step, self.step, self.batch, self.first_sample = first_step, step, batch, first_sample


class _Health:
    """Leaves out steps whose gradient is not finite, without a host that waits for a GPU. The same on all workers,
    because the gradient's norm is."""

    def __init__(self, device: torch.device) -> None:
        self._is_bad = torch.zeros((), device=device)
        self._in_row = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)

    def update(self, norm: Tensor) -> None:
        """Judge a step by the norm of its gradient."""
        self._is_bad = (~norm.isfinite()).to(torch.float32)
        self._in_row = (self._in_row + 1) * self._is_bad
        self._skipped += self._is_bad

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's step, if the gradient is finite."""
        if all(group.get("fused") for group in optimizer.param_groups):
            # The fused kernel looks at these attributes, as torch's GradScaler sets them, on the device.
            optimizer.found_inf, optimizer.grad_scale = self._is_bad, None  # type: ignore[attr-defined]
            optimizer.step()
        elif not self._is_bad.item():
            optimizer.step()

    def take_skipped(self) -> int:
        """Steps left out since the last call."""
        skipped = int(self._skipped.item())
        self._skipped.zero_()
        return skipped

    def refuse(self, limit: int, step: int, batch: Batch, first_sample: int) -> None:
        """Raise Diverged after too many bad steps in a row.   Args: step: finished ones; the others as of Diverged."""
        in_row = int(self._in_row.item())
        if in_row >= limit:
            raise Diverged(step - in_row, step, batch, first_sample)


def _is_late(minutes: float | None, saved_at: float, device: torch.device) -> bool:
    """Whether the last checkpoint is so old; the mean over the workers, so that they agree."""
    return minutes is not None and _mean(time.monotonic() - saved_at, device) >= 60 * minutes


@dataclass
class Broken:
    """An image that could not be used, as it was kept in a checkpoint."""

    row: int
    where: str
    reason: str


def _as_dicts(broken: Sequence[BrokenImage]) -> list[dict[str, Any]]:
    return [{"row": item.row, "where": item.where, "reason": item.reason} for item in broken]


def _refuse_hopeless(broken: int, seen: int, config: LoopConfig, example: str) -> None:
    """Stop a run that reads next to nothing but broken images. All inputs are the same on every worker."""
    if config.is_hopeless(broken, seen):
        raise TrainingStopped(
            f"{broken} of the first {seen} images could not be used{example}; the set cannot be trained on: look "
            "at it with pipelines/stats.py, which names the broken images, and repair it or choose another --data."
        )


def _refuse_bad_progress(state: TrainState, config: LoopConfig, length: RunLength, example: str) -> None:
    """Stop a run that has diverged or that mostly sees substitutes. All inputs are the same on every worker."""
    loss = state.metrics["loss"]
    largest = float("inf") if config.max_loss is None else config.max_loss
    if loss > largest:  # where no step of a log interval was finite, there is no mean: Diverged will tell
        raise TrainingStopped(f"The loss is {loss} at step {state.step}: {DIVERGED}")
    # Wait for enough images to judge: a thousand, or one epoch of a smaller set.
    enough = state.images_seen >= min(1000, length.steps_per_epoch * config.batch_size)
    fraction = state.broken_images / state.images_seen
    if enough and fraction > config.max_broken_fraction:
        raise TrainingStopped(
            f"{state.broken_images} of {state.images_seen} images could not be used ({fraction:.1%}, more than "
            f"{config.max_broken_fraction:.1%}{example}): look at broken_images.jsonl, repair the data set, or "
            "raise --loop.max-broken-fraction."
        )


class _Averages:
    """Means of scalars over the images of all steps and workers, without those that are not finite; nothing is copied
    to the CPU before `reduce`."""

    def __init__(self, device: torch.device, state: Mapping[str, tuple[float, float]] | None = None) -> None:
        """Args: state: of another process's `state`, at the same step."""
        self._device = device
        num_workers = dist.get_world_size() if dist.is_initialized() else 1
        shares = {name: [part / num_workers for part in parts] for name, parts in (state or {}).items()}
        self._sums = {name: torch.tensor(part, dtype=torch.float64, device=device) for name, part in shares.items()}
        """(2,) float64: sum over images and their number."""

    def add(self, values: Mapping[str, Tensor], num_images: int) -> None:
        """Args: values: each a mean over so many images."""
        for name, value in values.items():
            number = value.detach().double()
            is_finite = number.isfinite()
            # where, and not a product: 0 times infinity is no number
            part = num_images * torch.stack([torch.where(is_finite, number, 0.0), is_finite.double()]).to(self._device)
            before = self._sums.get(name)
            self._sums[name] = part if before is None else before + part

    def state(self) -> dict[str, tuple[float, float]]:
        """Sum and number of all workers; every worker calls it."""
        totals = self._totals() if self._sums else torch.empty(0, 2)
        return {name: (total, count) for name, (total, count) in zip(sorted(self._sums), totals.tolist(), strict=True)}

    def reduce(self) -> dict[str, float]:
        """Means over steps and workers; the sums begin anew."""
        names, totals = sorted(self._sums), self._totals()
        self._sums = {}
        return dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))

    def _totals(self) -> Tensor:
        """(names, 2) over all workers."""
        totals = torch.stack([self._sums[name] for name in sorted(self._sums)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        return totals


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
