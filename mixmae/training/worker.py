"""The Ray Train shell around the plain loop: worker group, checkpoints through Ray, messages to the driver.

A pipeline passes a TrainingJob; everything that is particular to a task or to MLflow is behind it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from PIL import Image
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixmae.machine import threads_per_process
from mixmae.step import StepOutput
from mixmae.training.checkpoint import load_checkpoint, read_state, save_checkpoint
from mixmae.training.ema import WeightAverage
from mixmae.training.failures import EvaluationSkipped, TrainingStopped, WorkersFailed
from mixmae.training.loop import Batch, BrokenImage, LoopConfig, TrainState, gather, step_seed, train
from mixmae.training.mailbox import Message, deliver, open_mailbox, reading
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.schedule import RunLength


class Tracker(Protocol):
    """Where rank 0 logs to."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_panel(self, image: Image.Image, step: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class TrainingJob(Protocol):
    """All that a worker needs to know of a task; pickled to the workers. mixmae.jobs has those that there are."""

    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def length(self) -> RunLength: ...
    @property
    def ema_decay(self) -> float | None:
        """Decay of a running average of the weights, which is evaluated and saved beside them; None: no average."""

    @property
    def best(self) -> tuple[str, Path] | None:
        """The metric of `evaluate` whose highest value is kept, and the folder for its weights; None: none is kept."""

    def build_model(self) -> nn.Module:
        """The module to train, on the CPU; draws from torch's global generator, which is seeded."""

    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> AbstractContextManager[Iterator[Batch]]:
        """This worker's micro-batches from a step on; leaving the context stops the stream."""

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator, first_sample: int) -> StepOutput:
        """One micro-batch through the task's forward."""

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> Mapping[str, float]:
        """Metrics that all workers measure together, the same on all of them: every rank calls it at the same steps.

        Raises: EvaluationSkipped, on every rank, where there are none this time.
        """

    def evaluate_untrained(self, model: nn.Module, *, rank: int, num_workers: int) -> Mapping[str, float]:
        """Metrics before the first step, likewise: where the curves start, and references for what comes after.

        References have names that begin with reference/. They are logged again at each evaluation, as level lines.
        """

    def left_out(self, *, rank: int) -> Sequence[Any]:
        """The BrokenImage records of this worker's part of the evaluations so far: they are in no figure."""

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """A picture of held-out images and the metrics that come with it, on rank 0 alone; None: nothing to draw."""

    def open_tracker(self) -> Tracker:
        """The tracker of rank 0. None of its methods raises or waits for a server: it must not stop training."""

    def describe(self) -> dict[str, Any]:
        """What goes into every checkpoint's state.json beside the position: config, data, run id, versions."""


def fit(
    job: TrainingJob,
    *,
    folder: Path,
    name: str,
    num_workers: int,
    use_gpu: bool,
    max_failures: int,
    checkpoints_to_keep: int | None,
    runs_at_once: int = 1,
    on_message: Callable[[Message], None],
    callbacks: Sequence[Any] = (),
) -> tuple[TrainState, str]:
    """Train to the end on a worker group, restarting it from the last checkpoint when a worker dies.

    Args:
        folder, name: checkpoints go to folder/name/; the same pair again continues from the last one there.
        max_failures: restarts of the worker group before giving up.
        runs_at_once: runs that share the cores of each node.
        on_message: called in this process, from another thread, with the messages of rank 0.
        callbacks: of Ray Train; they see the step and the latest metrics with every checkpoint.
    Returns: the final state and the path of the last checkpoint.
    Raises: TrainingStopped when training cannot go on; KeyboardInterrupt after Ctrl-C; WorkersFailed.
    """
    for variable, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    mailbox = open_mailbox()
    # The ignores: ray.train is typed as its first version, but is the second one at run time.
    trainer = _Trainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job, "mailbox": mailbox, "runs_at_once": runs_at_once},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=checkpoints_to_keep),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )
    with reading(mailbox, on_message):
        try:
            result = trainer.fit()
        except SystemExit as stop:  # how Ray Train ends the driver after Ctrl-C
            raise KeyboardInterrupt from stop
        except ray.train.TrainingFailedError as error:
            raise WorkersFailed(_cause(error)) from error
    outcome = result.return_value  # type: ignore[attr-defined]
    if outcome is None:  # Ctrl-C again: the controller was told to stop and came back without a result
        raise KeyboardInterrupt
    if outcome["stopped"]:
        raise TrainingStopped(outcome["stopped"])
    assert result.checkpoint is not None, "a finished run has saved its last step"
    return TrainState(**outcome["state"]), result.checkpoint.path


def run_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker process runs.

    Returns: {"state": the final TrainState as a dict, "stopped": why training could not go on, or None}. A stop is a
    result and not an exception because Ray would restart the group after an exception, and this would not help.
    """
    try:
        return _run_worker(**settings)
    except Exception as error:
        line = f"rank {ray.train.get_context().get_world_rank()}: {type(error).__name__}: {_first_line(error)}"
        deliver(settings["mailbox"], ("failed", line))
        raise


def _run_worker(job: TrainingJob, mailbox: Any, runs_at_once: int) -> dict[str, Any]:
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray sets one thread for a worker of one CPU; the cores of this node are shared by its workers.
        torch.set_num_threads(threads_per_process(context.get_local_world_size() * runs_at_once))
    else:
        torch.set_float32_matmul_precision("high")

    torch.manual_seed(step_seed(job.loop.seed, "init"))
    model = job.build_model().to(device)
    optimizer = build_optimizer(model, job.optim)
    average = None if job.ema_decay is None else WeightAverage(model, job.ema_decay)
    state = TrainState()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            saved = load_checkpoint(directory, model=model, optimizer=optimizer, average=average)
        state = TrainState(**saved["position"])

    trained: nn.Module = model
    if job.loop.compile:
        model.compile()  # in place: names in checkpoints stay as they are
    if num_workers > 1:
        trained = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    with contextlib.ExitStack() as stack:
        events = _WorkerEvents(job, model, optimizer, average, mailbox, rank=rank, num_workers=num_workers)
        if rank == 0:
            mailbox.put.remote(("started", state.step))
        stack.callback(events.close)
        batches = stack.enter_context(job.open_batches(rank=rank, num_workers=num_workers, start_step=state.step))
        if state.step == 0:
            untrained = events.measure(0)
            state.references = {name: value for name, value in untrained.items() if name.startswith("reference/")}
        events.references = state.references
        try:
            train(
                model=trained,
                optimizer=optimizer,
                average=average,
                peak_lr=job.optim.peak_lr(job.loop.batch_size),
                clip_grad_norm=job.optim.clip_grad_norm,
                step_function=job.step,
                batches=batches,
                state=state,
                config=job.loop,
                length=job.length,
                events=events,
                device=device,
            )
        except TrainingStopped as stop:
            return {"state": vars(state), "stopped": str(stop)}
    return {"state": vars(state), "stopped": None}


class _Trainer(ray.train.torch.TorchTrainer):
    """Ray Train without its actor for data sets: the workers have streams of their own (mixmae.data.streams)."""

    def _create_default_callbacks(self) -> list[Any]:
        usual = super()._create_default_callbacks()  # type: ignore[misc]
        return [item for item in usual if not isinstance(item, DatasetsCallback)]


class _WorkerEvents:
    """The loop's Events inside a Ray Train worker: rank 0 logs and sends, every rank takes part in Ray's barriers."""

    def __init__(
        self,
        job: TrainingJob,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        mailbox: Any,
        *,
        rank: int,
        num_workers: int,
    ) -> None:
        self._job, self._model, self._optimizer, self._average = job, model, optimizer, average
        self._mailbox, self._rank, self._num_workers = mailbox, rank, num_workers
        self._tracker = job.open_tracker() if rank == 0 else None
        self._reported_skip = False
        self._num_left_out = 0
        self.references: Mapping[str, float] = {}

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[BrokenImage]) -> None:
        if self._tracker is None:
            return
        self._tracker.log_metrics(curve_names(record), step)
        self._mailbox.put.remote(("progress", {"step": step, **record}))
        if broken:
            self._mailbox.put.remote(("broken", _entries(broken)))

    def evaluate(self, step: int) -> Mapping[str, float]:
        measured = self.measure(step)
        if self._tracker is None:
            return measured
        with torch.no_grad():
            image, metrics = self._job.draw_panel(self._model)
        if metrics:
            self._tracker.log_metrics(curve_names(metrics), step)
        if image is not None:
            self._tracker.log_panel(image, step)
        return {**measured, **metrics}

    def measure(self, step: int) -> dict[str, float]:
        """What all workers measure together: logged, and sent to the driver. The model is left in eval mode."""
        self._model.eval()
        try:
            measured = self._measure_both(step)
        except EvaluationSkipped as skipped:
            if self._rank == 0 and not self._reported_skip:
                self._reported_skip = True
                self._mailbox.put.remote(("note", str(skipped)))
            measured = {}
        self._report_left_out()
        if self._tracker is not None and measured:
            self._mailbox.put.remote(("evaluation", {"step": step, **measured}))
            self._tracker.log_metrics(curve_names(measured), step)
        return measured

    def _report_left_out(self) -> None:
        """Name the broken images of the evaluations, once."""
        by_place = {item.where: item for item in gather(list(self._job.left_out(rank=self._rank)))}
        found = sorted(by_place.values(), key=lambda item: item.row)
        if self._rank == 0 and len(found) > self._num_left_out:
            self._num_left_out = len(found)
            self._mailbox.put.remote(("left_out", _entries(found)))

    def _measure_both(self, step: int) -> dict[str, float]:
        """The metrics of the weights and, under names with _ema, of their average; the best of both are kept."""
        share: dict[str, int] = {"rank": self._rank, "num_workers": self._num_workers}
        if step == 0:
            return dict(self._job.evaluate_untrained(self._model, **share))
        metrics = dict(self._job.evaluate(self._model, **share))
        self._keep_if_best(step, metrics, "trained")
        if self._average is not None:
            with self._average.applied_to(self._model):
                averaged = self._job.evaluate(self._model, **share)
                self._keep_if_best(step, averaged, "averaged")
            metrics |= {name.replace("/", "_ema/", 1): value for name, value in averaged.items()}
        return {**metrics, **self.references}

    def _keep_if_best(self, step: int, metrics: Mapping[str, float], weights: str) -> None:
        if self._rank != 0 or self._job.best is None:
            return
        name, folder = self._job.best
        # The file and not the memory of this process: the workers may have been started again since.
        if folder.exists() and read_state(folder)["metrics"][name] >= metrics[name]:
            return
        state = self._job.describe() | {"position": {"step": step}, "metrics": dict(metrics), "weights": weights}
        save_checkpoint(folder, model=self._model, optimizer=None, state=state)

    def save(self, state: TrainState) -> None:
        name = f"step_{state.step:07d}"
        if self._rank != 0:
            ray.train.report({"step": state.step}, checkpoint_dir_name=name)
            return
        assert self._tracker is not None
        self._tracker.sync()
        with tempfile.TemporaryDirectory(prefix="mixmae_checkpoint_") as parent:
            local = Path(parent) / name
            described = self._job.describe() | {"position": vars(state)}
            save_checkpoint(local, model=self._model, optimizer=self._optimizer, average=self._average, state=described)
            # Ray copies the folder to the run's storage and only then lists it as the latest checkpoint.
            ray.train.report(
                {**state.metrics, "step": state.step},
                checkpoint=ray.train.Checkpoint.from_directory(local),
                checkpoint_dir_name=name,
            )
        self._mailbox.put.remote(("saved", state.step))

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()
            # An actor takes one caller's messages in order: once this one is there, all are.
            deliver(self._mailbox, ("closed", None))


def _entries(broken: Sequence[BrokenImage]) -> list[dict[str, Any]]:
    return [{"row": item.row, "where": item.where, "reason": item.reason} for item in broken]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _cause(error: ray.train.TrainingFailedError) -> str:
    """What went wrong first, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        return f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}"
    return _first_line(error)


_CURVE_GROUPS = {
    "images_per_s": "perf",
    "data_wait_share": "perf",
    "step_s": "perf",
    "broken_images": "data",
}


def curve_names(record: Mapping[str, float]) -> dict[str, float]:
    """Metric names as the MLflow UI groups them: train/loss, perf/images_per_s; names with a slash stay as they are."""
    return {
        name if "/" in name else f"{_CURVE_GROUPS.get(name, 'train')}/{name}": value for name, value in record.items()
    }
