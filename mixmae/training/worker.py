"""The Ray Train shell around the plain loop: worker group, checkpoints through Ray, messages to the driver.

A pipeline passes a TrainingJob; everything that is particular to a task or to MLflow is behind it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from PIL import Image
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixmae.machine import threads_per_process
from mixmae.share import WorkerRange, WorkerShare
from mixmae.step import StepOutput
from mixmae.training.budget import FailureBudget
from mixmae.training.checkpoint import (
    STATE_FILE,
    CheckpointError,
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    verify,
)
from mixmae.training.compile import compile_blocks
from mixmae.training.diverged import write_diverged
from mixmae.training.elastic import Elastic
from mixmae.training.ema import WeightAverage
from mixmae.training.failures import EvaluationSkipped, Interrupted, TrainingStopped
from mixmae.training.interrupt import signals
from mixmae.training.loop import (
    DIVERGED,
    Batch,
    BrokenImage,
    Diverged,
    LoopConfig,
    TrainState,
    gather,
    step_seed,
    train,
)
from mixmae.training.mailbox import Message, deliver, open_mailbox, reading
from mixmae.training.mirror import Mirror
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.recompute import recompute_stages
from mixmae.training.run_store import DamagedCopy, RunStore
from mixmae.training.saving import CheckpointWriter, give_parts
from mixmae.training.schedule import RunLength
from mixmae.training.sharding import Gather, is_sharded, shard, unsharded
from mixmae.training.watchdog import Watchdog

_LISTEN_S = 0.5
_STOP_KEY = "mixmae/stop"
_MAY_BE_PREEMPTED = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"


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

    def share(self, *, rank: int, num_workers: int) -> WorkerShare:
        """This worker's part of every batch."""

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


def _always() -> bool:
    return True


def fit(
    job: TrainingJob,
    *,
    folder: Path,
    name: str,
    workers: WorkerRange,
    use_gpu: bool,
    max_failures: int,
    checkpoints_to_keep: int | None,
    runs_at_once: int = 1,
    on_message: Callable[[Message], None],
    callbacks: Sequence[Any] = (),
    may_write: Callable[[], bool] = _always,
    store: RunStore | None = None,
) -> tuple[TrainState, str]:
    """Train to the end on a worker group, starting a new one from the last checkpoint when it fails.

    Args:
        folder, name: checkpoints go to folder/name/; the same pair again continues from the newest one there that is
            whole. What Ray keeps for itself goes to folder/.ray, and is deleted at the end.
        workers: how many of them each start may have (elastic.py).
        max_failures: restarts without a new checkpoint between them before giving up (budget.py).
        runs_at_once: runs that share the cores of each node.
        on_message: called in this process, from another thread, with the messages of rank 0.
        callbacks: of Ray Train; they see the step and the latest metrics with every checkpoint.
        may_write: asked by rank 0 before it writes a checkpoint, and here all the time; pickled.
        store: that the folder, one of each node's own then, is copied to.
    Returns: the final state and the path of the last checkpoint.
    Raises: TrainingStopped when training cannot go on; Interrupted after SIGINT or SIGTERM; WorkersFailed; FolderLost
        when the run may not write any more.
    """
    for variable, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    checkpoints, scratch = folder / name, folder / ".ray"
    budget = FailureBudget(max_failures)
    settings = {
        "job": job,
        "checkpoints": checkpoints,
        "keep": checkpoints_to_keep,
        "runs_at_once": runs_at_once,
        "may_write": may_write,
        "store": store,
    }
    num_blocks = job.share(rank=0, num_workers=1).num_blocks
    elastic = Elastic(workers, use_gpu=use_gpu, num_blocks=num_blocks, note=lambda line: on_message(("note", line)))
    with signals(may_write) as asked_to_stop:
        while True:
            num_workers = elastic.choose(asked_to_stop.sleep)
            on_message(("workers", {"count": num_workers, "of": str(workers)}))
            mailbox = open_mailbox()
            causes: list[str] = []

            def receive(message: Message, causes: list[str] = causes) -> None:
                if message[0] == "failed":
                    causes.append(message[1])
                on_message(message)

            shutil.rmtree(scratch, ignore_errors=True)  # an earlier one's snapshot must not be found
            trainer = _trainer(
                settings | {"mailbox": mailbox}, scratch, num_workers, use_gpu, callbacks, workers.is_elastic
            )
            try:
                with reading(mailbox, receive) as heard, elastic.watching(mailbox, heard):
                    outcome = asked_to_stop.run(trainer.fit, mailbox, heard).return_value
                state = TrainState(**outcome["state"])
                is_over = outcome["stopped"] or state.step >= job.length.total_steps or asked_to_stop.signal
                if is_over or not elastic.grows:
                    break
            except ray.train.TrainingFailedError as error:
                elastic.failed()
                cause = causes[0] if causes else _cause(error)
                refuse_out_of_memory(cause)
                step = _newest_step(checkpoints, store)
                wait = budget.spend(step, cause)
                on_message(("restart", f"{cause}; starting again in {wait:.0f} s" if wait >= 5 else cause))
                asked_to_stop.sleep(wait)
    shutil.rmtree(scratch, ignore_errors=True)
    if outcome["stopped"]:
        raise TrainingStopped(outcome["stopped"])
    if state.step < job.length.total_steps:
        raise Interrupted(asked_to_stop.signal)
    return state, outcome["checkpoint"]


def _newest_step(checkpoints: Path, store: RunStore | None) -> int:
    """The step of the newest checkpoint, as far as it can be seen; -1: there is none."""
    names = [path.name for path in list_checkpoints(checkpoints)[:1]]
    with contextlib.suppress(OSError):
        names += [] if store is None else store.checkpoints()[:1]
    return max((int(name.removeprefix("step_")) for name in names), default=-1)


def refuse_out_of_memory(cause: str) -> None:
    """Raise TrainingStopped if a GPU's memory was too small: the same batch would not fit into a new worker either."""
    if torch.OutOfMemoryError.__name__ in cause:
        raise TrainingStopped(
            f"a GPU has too little memory for the batch ({cause}): lower --loop.micro-batch-size, which changes no "
            "result, or use more workers."
        )


def _trainer(
    settings: dict[str, Any],
    scratch: Path,
    num_workers: int,
    use_gpu: bool,
    callbacks: Sequence[Any],
    is_elastic: bool,
) -> _Trainer:
    failures: dict[str, Any] = {"max_failures": 0}  # budget.py counts otherwise
    if is_elastic:  # nor may Ray wait for places, or start as many workers again where a node was preempted
        failures |= {"controller_failure_limit": 0, "max_preemption_failures": 0}
    # The ignores: ray.train is typed as its first version, but is the second one at run time.
    return _Trainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=f"{time.time_ns():x}",
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(**failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )


def run_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker process runs.

    Returns: {"state": the final TrainState as a dict, "checkpoint": path of the last one, "stopped": why training could
    not go on, or None}. A stop is a result and not an exception because an exception starts the group again, and this
    would not help.
    """
    try:
        return _run_worker(**settings)
    except Exception as error:
        line = f"rank {ray.train.get_context().get_world_rank()}: {type(error).__name__}: {_innermost(error)}"
        deliver(settings["mailbox"], ("failed", line))
        raise


def _run_worker(
    job: TrainingJob,
    mailbox: Any,
    checkpoints: Path,
    keep: int | None,
    runs_at_once: int,
    may_write: Callable[[], bool],
    store: RunStore | None,
) -> dict[str, Any]:
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    # Ray sets one thread for a worker of one CPU; the cores of this node are shared by its workers. Beside a GPU they
    # solve the probe's equations.
    torch.set_num_threads(threads_per_process(context.get_local_world_size() * runs_at_once))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if job.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is used: it asks for one of these
        torch.use_deterministic_algorithms(True)

    if store is not None:
        _bring_to_node(store, rank=rank, num_workers=num_workers)
    torch.manual_seed(step_seed(job.loop.seed, "init"))
    model = job.build_model().to(device)
    gather = shard(model, device) if job.loop.shard and num_workers > 1 else unsharded(model)
    if job.loop.compile:
        compile_blocks(model, device)
    recompute_stages(model, job.loop.recompute_stages)
    optimizer = build_optimizer(model, job.optim)
    average = None if job.ema_decay is None else WeightAverage(model, job.ema_decay)

    trained: nn.Module = model
    with contextlib.ExitStack() as stack:
        if store is not None and rank == 0:
            say = partial(_note, mailbox)
            # The first to come, so that it ends last, when all is written: it waits for the store.
            stack.enter_context(Mirror(store, "worker", keep=keep, may_write=may_write, say=say))
        events = _WorkerEvents(job, model, gather, optimizer, average, mailbox, rank=rank, num_workers=num_workers)
        stack.callback(events.close)
        writes_here = may_write if store is None else _always  # the mirror asks
        events.writer = CheckpointWriter(checkpoints, keep=keep, may_write=writes_here, report=events.note)
        events.watchdog = Watchdog(checkpoints.parent / f"stacks_rank{rank}.txt", events.failed)
        stack.callback(events.watchdog.close)
        went_back: set[int] = set()
        """First bad steps after which the run has gone back once."""
        stopped = None
        while True:
            try:
                state = _resume(
                    checkpoints, model, optimizer, average, events.note, rank=rank, num_workers=num_workers, store=store
                )
            except CheckpointError as error:
                return {"state": vars(TrainState()), "checkpoint": "", "stopped": str(error)}
            if num_workers > 1 and trained is model and not is_sharded(model):
                # Never static_graph: DDP looks for tensors in what the model returns, and finds none in a StepOutput.
                trained = DistributedDataParallel(
                    model,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    # Tables are built alike everywhere; only the statistics of a linear probe's BatchNorm are not.
                    broadcast_buffers=any(name.endswith("running_mean") for name, _ in model.named_buffers()),
                    gradient_as_bucket_view=True,  # one copy of the gradients less
                )
            events.has_checkpoint = state.step > 0
            if rank == 0:
                mailbox.put.remote(("started", state.step))
            try:
                with job.open_batches(rank=rank, num_workers=num_workers, start_step=state.step) as batches:
                    if state.step == 0:
                        untrained = events.measure(0)
                        references = {key: value for key, value in untrained.items() if key.startswith("reference/")}
                        state.references = references
                    events.references = state.references
                    train(
                        model=trained,
                        optimizer=optimizer,
                        average=average,
                        peak_lr=job.optim.peak_lr(job.loop.batch_size),
                        clip_grad_norm=job.optim.clip_grad_norm,
                        step_function=job.step,
                        batches=batches,
                        share=job.share(rank=rank, num_workers=num_workers),
                        state=state,
                        config=job.loop,
                        length=job.length,
                        events=events,
                        device=device,
                    )
                break
            except Diverged as bad:
                with contextlib.suppress(OSError):  # then to the one before
                    events.wait_for_checkpoint()
                if bad.first_step not in went_back and events.has_checkpoint:
                    went_back.add(bad.first_step)
                    events.note(f"{bad}: going back to the last checkpoint")
                    continue
                dump = checkpoints.parent / "diverged"
                write_diverged(dump / f"rank{rank}", job=job, model=model, bad=bad)
                stopped = f"{bad}: {DIVERGED} pipelines/replay.py runs the last of them, which is kept in {dump}."
                break
            except TrainingStopped as stop:
                stopped = str(stop)
                break
        events.wait_for_checkpoint()
    last = next(map(str, list_checkpoints(checkpoints)), "")
    if store is not None and last:
        last = f"{store.shown}/checkpoints/{Path(last).name}"
    return {"state": vars(state), "checkpoint": last, "stopped": stopped}


def _bring_to_node(store: RunStore, *, rank: int, num_workers: int) -> None:
    """Have what workers need from a run's store on each node before any of them looks for it."""
    store.local.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        store.bring("worker")
    if ray.train.get_context().get_local_rank() == 0:
        store.bring_initial()
    if num_workers > 1:
        dist.barrier()


def _resume(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    note: Callable[[str], None],
    *,
    rank: int,
    num_workers: int,
    store: RunStore | None,
) -> TrainState:
    """Load the newest checkpoint that is whole; a run without any starts anew.

    Raises: CheckpointError, on all workers, if there are checkpoints but none is whole, or they are of another model.
    """
    chosen: list[str | None] = [None]
    if rank == 0:
        there = _candidates(checkpoints, store)
        for path, is_here in there:
            try:
                if store is not None and not is_here:
                    shutil.rmtree(path, ignore_errors=True)  # damaged
                    store.get_folder(f"checkpoints/{path.name}", path)
                verify(path)
                load_checkpoint(path, model=model, optimizer=optimizer, average=average)
            except DamagedCopy as error:
                note(f"{error} It is passed over.")
                assert store is not None
                store.move(f"checkpoints/{path.name}", f"damaged/{path.name}")
                continue
            except DamagedCheckpoint as error:
                note(f"{error} It is passed over.")
                continue
            except CheckpointError:
                pass  # every rank will say it
            chosen = [str(path)]
            break
        if there and chosen == [None]:
            chosen = [""]
    if num_workers > 1:
        dist.broadcast_object_list(chosen)
    if chosen == [None]:
        return TrainState()
    if chosen == [""]:
        place = checkpoints if store is None else f"{store.shown}/checkpoints"
        raise DamagedCheckpoint(
            f"none of the checkpoints in {place} is whole: put one back from a copy, or choose another --output."
        )
    if store is not None and num_workers > 1:
        _share(Path(str(chosen[0])), store, rank=rank)
    return TrainState(**load_checkpoint(str(chosen[0]), model=model, optimizer=optimizer, average=average)["position"])


def _candidates(checkpoints: Path, store: RunStore | None) -> list[tuple[Path, bool]]:
    """Where checkpoints may be, the newest first, each with whether it is here already, or in the store."""
    found = [(path, True) for path in list_checkpoints(checkpoints)]
    found += [(checkpoints / name, False) for name in (store.checkpoints() if store else ())]
    return sorted(found, key=lambda item: (item[0].name, item[1]), reverse=True)


def _share(checkpoint: Path, store: RunStore, *, rank: int) -> None:
    """Have the checkpoint that rank 0 has chosen on every node."""
    context = ray.train.get_context()
    state: list[bytes | None] = [(checkpoint / STATE_FILE).read_bytes() if rank == 0 else None]
    name = f"checkpoints/{checkpoint.name}"
    is_spread = context.get_local_world_size() < context.get_world_size()
    if rank == 0 and is_spread and store.read(f"{name}/{STATE_FILE}") != state[0]:
        store.put_folder(checkpoint, name)  # the store was away when it was written
    dist.broadcast_object_list(state)
    own = checkpoint / STATE_FILE
    if context.get_local_rank() == 0 and not (own.is_file() and own.read_bytes() == state[0]):
        shutil.rmtree(checkpoint, ignore_errors=True)
        store.get_folder(name, checkpoint)
    dist.barrier()


def _note(mailbox: Any, line: str) -> None:
    mailbox.put.remote(("note", line))


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
        gather: Gather,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        mailbox: Any,
        *,
        rank: int,
        num_workers: int,
    ) -> None:
        self._job, self._model, self._gather, self._optimizer, self._average = job, model, gather, optimizer, average
        self._mailbox, self._rank, self._num_workers = mailbox, rank, num_workers
        self._tracker = job.open_tracker() if rank == 0 else None
        self._reported_skip = False
        self._num_left_out = 0
        self._is_stopping = self._wants_checkpoint = self.has_checkpoint = False
        self.references: Mapping[str, float] = {}
        self.writer: CheckpointWriter
        self.watchdog: Watchdog
        if rank == 0:
            threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def _listen(self) -> None:
        """Learn from the mailbox when the driver asks for the end."""
        while not self._is_stopping:
            time.sleep(_LISTEN_S)
            with contextlib.suppress(Exception):  # its death must not be the run's
                self._is_stopping = ray.get(self._mailbox.is_stopping.remote(), timeout=30)

    def note(self, line: str) -> None:
        """Send a line to the driver, of rank 0."""
        if self._rank == 0:
            self._mailbox.put.remote(("note", line))

    def failed(self, line: str) -> None:
        """Send the reason of this worker's end, from any rank, and see that it arrives."""
        deliver(self._mailbox, ("failed", f"rank {self._rank}: {line}"))

    def beat(self) -> None:
        self.watchdog.beat()

    def asked(self, step: int) -> Literal["", "save", "stop"]:
        if self._wants_checkpoint:
            self._wants_checkpoint = False
            return "save"
        if self._num_workers == 1:
            return "stop" if self._is_stopping else ""
        # Rank 0 says so before its next step, and no rank ends that step without it: all see it at the same one.
        store = dist.distributed_c10d._get_default_store()
        if self._rank == 0 and self._is_stopping and not store.check([_STOP_KEY]):
            store.set(_STOP_KEY, str(step + 1))
        return "stop" if store.check([_STOP_KEY]) and step >= int(store.get(_STOP_KEY)) else ""

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[BrokenImage]) -> None:
        if _MAY_BE_PREEMPTED:  # all workers ask together
            self._wants_checkpoint = ray.train.get_preemption_info() is not None
        if step == 1 and self._rank == 0:
            self.writer.reserve(self._model, self._optimizer, self._average)
        if self._tracker is None:
            return
        record = {**record, "workers": self._num_workers}
        self._tracker.log_metrics(curve_names(record), step)
        self._mailbox.put.remote(("progress", {"step": step, **record}))
        if broken:
            self._mailbox.put.remote(("broken", _entries(broken)))

    def evaluate(self, step: int) -> Mapping[str, float]:
        with self.watchdog.paused():
            return self._evaluate(step)

    def _evaluate(self, step: int) -> Mapping[str, float]:
        measured = self.measure(step)
        with self._gather() as model, torch.no_grad():
            if self._tracker is None:
                return measured
            image, metrics = self._job.draw_panel(model)
        if metrics:
            self._tracker.log_metrics(curve_names(metrics), step)
        if image is not None:
            self._tracker.log_panel(image, step)
        return {**measured, **metrics}

    def measure(self, step: int) -> dict[str, float]:
        """What all workers measure together: logged, and sent to the driver. The model is left in eval mode."""
        self._model.eval()
        try:
            with self.watchdog.paused():
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
        with self._gather() as model:
            if step == 0:
                return dict(self._job.evaluate_untrained(model, **share))
            metrics = dict(self._job.evaluate(model, **share))
            self._keep_if_best(step, model, metrics, "trained")
        if self._average is not None:
            with self._average.applied_to(self._model), self._gather() as model:
                averaged = self._job.evaluate(model, **share)
                self._keep_if_best(step, model, averaged, "averaged")
            metrics |= {name.replace("/", "_ema/", 1): value for name, value in averaged.items()}
        return {**metrics, **self.references}

    def _keep_if_best(self, step: int, model: nn.Module, metrics: Mapping[str, float], weights: str) -> None:
        if self._rank != 0 or self._job.best is None:
            return
        name, folder = self._job.best
        # The file and not the memory of this process: the workers may have been started again since.
        if folder.exists() and read_state(folder)["metrics"][name] >= metrics[name]:
            return
        state = self._job.describe() | {"position": {"step": step}, "metrics": dict(metrics), "weights": weights}
        save_checkpoint(folder, model=model, optimizer=None, state=state)

    def save(self, state: TrainState) -> None:
        self.has_checkpoint = True
        metrics = {**state.metrics, "step": state.step}
        if self._rank == 0:
            assert self._tracker is not None
            self._tracker.sync()  # what was logged up to this step outlives the step
            described = self._job.describe() | {"position": copy.deepcopy(vars(state))}
            with self.watchdog.paused():
                pause_s = self.writer.save(
                    step=state.step,
                    model=self._model,
                    optimizer=self._optimizer,
                    average=self._average,
                    state=described,
                )
            self._tracker.log_metrics({"perf/checkpoint_pause_s": pause_s}, state.step)
            self._mailbox.put.remote(("saved", state.step))
        elif is_sharded(self._model):
            with self.watchdog.paused():
                give_parts(self._model, self._optimizer, self._average)
        ray.train.report(metrics if self._rank == 0 else {"step": state.step})

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is written, on the rank that writes it.   Raises: OSError if it cannot be."""
        if self._rank == 0:
            self.writer.wait()

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()
            # An actor takes one caller's messages in order: once this one is there, all are.
            deliver(self._mailbox, ("closed", None))


def _entries(broken: Sequence[BrokenImage]) -> list[dict[str, Any]]:
    return [{"row": item.row, "where": item.where, "reason": item.reason} for item in broken]


def _innermost(error: BaseException) -> str:
    """The first line of the error that others were raised from: Ray wraps what happens in its tasks."""
    seen = [error]
    while (cause := getattr(seen[-1], "cause", None) or seen[-1].__cause__) is not None and cause not in seen:
        if not isinstance(cause, BaseException):
            break
        seen.append(cause)
    return (str(seen[-1]).strip().splitlines() or [type(seen[-1]).__name__])[0][:500]


def _cause(error: ray.train.TrainingFailedError) -> str:
    """What went wrong first, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        return f"rank {rank}: {type(cause).__name__}: {_innermost(cause)}"
    return _innermost(error)


_CURVE_GROUPS = {
    "images_per_s": "perf",
    "data_wait_share": "perf",
    "step_s": "perf",
    "workers": "perf",
    "broken_images": "data",
}


def curve_names(record: Mapping[str, float]) -> dict[str, float]:
    """Metric names as the MLflow UI groups them: train/loss, perf/images_per_s; names with a slash stay as they are."""
    return {
        name if "/" in name else f"{_CURVE_GROUPS.get(name, 'train')}/{name}": value for name, value in record.items()
    }
