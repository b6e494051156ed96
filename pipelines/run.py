"""A run between its command line and its end: folder, record, MLflow, workers. All pipelines that train use it.

    run = begin(arguments, recipe)        # the folder is the run's; None: the run is finished
    job = run.record_data(job)            # the training set is recorded, or refused if it is not that of before
    run.join_cluster(job)
    job = run.track(job)                  # the journal is open, and MLflow's run, if MLflow is there
    done = run.train(job)                 # the workers train, the record is closed

What is trained is the job's: see mixmae.jobs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from mixmae.data.account import Account
from mixmae.data.sources.storage import plain_place
from mixmae.jobs.config import BRANCHABLE, RunConfig, completed, differences, to_json
from mixmae.jobs.job import Job
from mixmae.jobs.record import RunRecord, compared_with_plan, read_begun, versions
from mixmae.jobs.supervised import SupervisedJob
from mixmae.lock import Hold, holds, take, taken_over
from mixmae.machine import Device
from mixmae.share import WorkerRange
from mixmae.stores import store_uri
from mixmae.tracking import (
    Journal,
    RunRef,
    Sender,
    backlog,
    create_run,
    mark_ended,
    preload,
    reopen_run,
    resolve_uri,
    send_rest,
    start_sending,
    unsent,
)
from mixmae.training import store_lock
from mixmae.training.checkpoint import step_of, verify
from mixmae.training.failures import FolderLost, TrainingStopped, WorkersFailed
from mixmae.training.loop import TrainState
from mixmae.training.mirror import HASTE_S, Mirror
from mixmae.training.progress import ProgressFile
from mixmae.training.run_folder import PLAN_FILE, RunFolder
from mixmae.training.run_store import StoreError
from pipelines.console import ProgressView

if TYPE_CHECKING:
    from mixmae.training.mailbox import Message

JobT = TypeVar("JobT", bound=Job)
ArgumentsT = TypeVar("ArgumentsT", bound="RunArguments")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The command line of a run: where to read, where to write, on what to run."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    data: str | None = None
    """Parquet shards, tars, a glob, a file list or a URI such as s3://BUCKET/PREFIX (docs/data.md), or a folder of
    image files, which is packed once into shards beside the output. Without it: the built-in moths."""
    output: Path | None = None
    """Folder of the run: checkpoints, panels, ledger of broken images. Default: runs/RECIPE[-DATA]. On a cluster it
    must be one that all nodes share, or in a store: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX."""
    staging: Path | None = None
    """For an --output in a store: the folder, on a disk of each node, below which the run works. Default: in the cache
    of this user."""
    workers: Annotated[int | str, tyro.conf.arg(metavar="N|MIN:MAX")] = 0
    """Training processes. 0: one per GPU; without GPUs one per core, or fewer where more would not shorten the steps;
    on a cluster one, so give their number there. 2:8 takes as many from 2 to 8 as there is room for at each start, and
    goes on with fewer when a node is lost and with more when one comes (docs/runtime.md)."""
    device: Device = "auto"
    """Where workers train; auto takes GPUs if the cluster has any."""
    resume: bool = False
    """Insist on continuing: fail if the output holds no interrupted run. (It is continued anyway if it does.)"""
    mlflow_uri: str | None = None
    """Tracking server, such as http://HOST:5000. Default: MLFLOW_TRACKING_URI, else mlflow.db beside the output."""
    experiment: str
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the output folder's name."""
    from_step: int | None = None
    """Go back to the checkpoint of this step, which must be kept still, and train on from there, perhaps with another
    --optim.base-lr, --optim.clip-grad-norm, --optim.weight-decay, --loop.warmup-epochs or length. MLflow gets a run of
    its own for it; what came after the step is put aside."""
    ray_address: str | None = None
    """Ray cluster. Default: RAY_ADDRESS (set by `ray job submit`), else one on this machine for this run."""
    max_failures: int = 3
    """Restarts from the last checkpoint, after a worker died, before giving up."""
    checkpoints_to_keep: int = 3
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if self.workers not in (0, "0"):
            WorkerRange.parse(self.workers)
        if self.output is not None:
            store_uri(self.output)

    @property
    def worker_range(self) -> WorkerRange:
        """How many workers there may be, once with_workers has chosen where 0 was given."""
        return WorkerRange.parse(self.workers)


def with_workers(arguments: ArgumentsT) -> ArgumentsT:
    """The arguments with the number of workers that was asked for, or else what suits machine and batch; of a range,
    with no more than these can have.

    Raises: ValueError if the batch cannot be cut into as many parts.
    """
    from mixmae.training.cluster import default_workers, is_own  # Ray takes a second to import: --help does without it

    config, address = arguments.config, arguments.ray_address
    num_blocks = config.share(num_workers=1).num_blocks
    if arguments.workers in (0, "0"):
        each = -(-num_blocks // default_workers(address, arguments.device))
        return replace(arguments, workers=-(-num_blocks // each))
    asked = arguments.worker_range
    config.share(num_workers=asked.least)
    if not asked.is_elastic:
        return replace(arguments, workers=asked.most)
    here = default_workers(address, arguments.device) if is_own(address) else asked.most
    most = max(asked.least, min(asked.most, num_blocks, here))
    if most < asked.most:
        why = f"this machine has room for {here}" if here < num_blocks else f"a batch has {num_blocks} parts"
        print(f"note: --workers {asked} is taken for {WorkerRange(asked.least, most)}: {why}")
    if config.draws_per_micro_batch and config.loop.micro_batch_size is None:
        print(
            "note: dropped paths, mixup and batch norm depend on how many images one worker gets, and so on the number "
            "of workers: with --loop.micro-batch-size they do not"
        )
    return replace(arguments, workers=str(WorkerRange(asked.least, most)))


def output_folder(arguments: RunArguments, recipe: str) -> RunFolder:
    """The output folder that was asked for, or the default one."""
    data_name = f"-{Path(plain_place(arguments.data)).name}" if arguments.data else ""
    return RunFolder(arguments.output or Path("runs") / f"{recipe}{data_name}", arguments.staging)


@dataclass(kw_only=True)
class Run:
    """A run under way. Make it with `begin`, then call the methods in their order."""

    arguments: RunArguments
    folder: RunFolder
    before: RunRecord | None
    """The record of the interrupted run that is continued, or None for a new one."""
    record: RunRecord
    """The record of this one."""
    uri: str
    """MLflow's store."""
    hold: Hold
    """The lock that the run is inside of: its folder's, or of a trial its sweep's."""
    use_gpu: bool = False
    runs_at_once: int = 1
    """Runs that share the machine."""
    exit_status: int = 130
    """Of the process, if the run was interrupted."""
    _is_interrupted: bool = False
    sender: Sender | None = None
    """What takes the journal to MLflow, while the run is tracked."""
    mirror: Mirror | None = None
    """What copies the driver's files to the store that the folder is in, if it is in one."""

    @property
    def data_folder(self) -> Path:
        """Where image folders and built-in sets are packed into shards, shared with the runs beside this one."""
        return self.folder.path.parent / "data"

    @property
    def is_continued(self) -> bool:
        """Whether steps of it may have been trained before."""
        return self.before is not None

    def record_data(self, job: JobT) -> JobT:
        """Record the training set and the classes; returns the job with the data as they were recorded at first.

        Raises: ValueError if the run was begun on others.
        """
        classes = job.classes if isinstance(job, SupervisedJob) else None
        self.record = replace(self.record, data=job.data, classes=classes)
        refuse_changes(self.before, self.record, self.folder.shown())
        if self.before is not None and self.before.data is not None:
            self.record = replace(self.record, data=self.before.data)
            job = replace(job, data=self.before.data)
        return job

    def join_cluster(self, job: Job) -> None:
        """Join or start Ray.

        Raises: ValueError if the job's set is smaller than a batch, before that; ClusterError if Ray cannot hold the
            workers.
        """
        from mixmae.training.cluster import join

        _ = job.length  # raises, before minutes are spent on a cluster
        arguments = self.arguments
        with ThreadPoolExecutor(1) as meanwhile:
            meanwhile.submit(preload, self.uri)
            self.use_gpu = join(
                arguments.ray_address,
                num_workers=arguments.worker_range.least,
                most_workers=arguments.worker_range.most,
                device=arguments.device,
            )
        if self.use_gpu and arguments.config.loop.precision == "float32":
            print("note: float32 on a GPU; --loop.precision bfloat16 is about twice as fast")

    def track(
        self,
        job: JobT,
        *,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> JobT:
        """Open the journal and the MLflow run: the interrupted run's own, or a new one with all that is known by now.

        MLflow may be away: the journal keeps what is logged, and the run is made once it answers.

        Args: tags: beside the job's own.  origin: as create_run takes it.
        Returns: the job that logs to it.
        Raises: TrackingError if MLflow has never had the run and answers otherwise than it should.
        """
        params = {
            **job.params,
            "recipe": self.record.recipe,
            "workers": self.arguments.workers,
            "gpu": int(self.use_gpu),
        }
        branch_tags = {f"branch.{name}": str(value) for name, value in (self.record.branch or {}).items()}
        all_tags = {**job.tags, **(tags or {}), **branch_tags}
        spec = self._spec(params, all_tags, None if parent_run_id else job.account)
        known = self.before.mlflow if self.before else None
        if known is not None and self.arguments.mlflow_uri is None:
            self.uri = known.uri
        self.sender = start_sending(
            self.folder.path,
            self.uri,
            {**spec, "parent_run_id": parent_run_id, "origin": origin},
            continues=self.is_continued,
            known=known,
            limit=self._journal_bytes,
        )
        if self.mirror is not None:
            self.mirror.start_journal()
        ref = self.sender.opened()
        self.write(status="running", mlflow=ref)
        if self.mirror is not None:
            self.mirror.push()
        if ref is not None:
            self._send_left()
        return replace(job, run=ref)

    def _journal_bytes(self) -> float:
        """Up to where MLflow may have the journal: never more than the store has, from which the run may go on."""
        return math.inf if self.mirror is None else self.mirror.journal_bytes

    def open(self, params: Mapping[str, Any], tags: Mapping[str, str], met: Account) -> RunRef:
        """The MLflow run of a sweep, which logs to it directly, and a record that it is under way.

        Args: met: in the data.   Raises: TrackingError, also if MLflow is away.
        """
        ref = self._reopen() or create_run(uri=self.uri, **self._spec(params, tags, met))
        self.write(status="running", mlflow=ref)
        return ref

    def _spec(self, params: Mapping[str, Any], tags: Mapping[str, str], met: Account | None) -> dict[str, Any]:
        """What create_run takes."""
        data = self.record.data
        assert data is not None, "record_data comes first"
        return {
            "experiment": self.arguments.experiment,
            "name": self.name,
            "params": params,
            "tags": {
                **tags,
                "output": self.folder.shown(),
                **{f"version.{name}": number for name, number in versions().items()},
            },
            "dataset": {"name": data.name, "digest": data.digest, "source": data.source},
            "tables": {"data": _table(met)} if met else {},
        }

    @property
    def name(self) -> str:
        """Of the MLflow run."""
        return self.arguments.run_name or self.folder.path.name

    def _reopen(self) -> RunRef | None:
        """The MLflow run of the interrupted run, set running again; None if there is none."""
        if self.before is None or self.before.mlflow is None:
            return None
        ref = self.before.mlflow
        if self.arguments.mlflow_uri in (None, ref.uri) and reopen_run(ref):
            return ref
        print(f"note: the interrupted run {ref.run_id} is not in {self.uri}; its curves go on in a new one")
        return None

    def write(self, **changes: Any) -> None:
        """Write the record with changed fields.

        Raises: LockError if the folder is another run's by now; ValueError if it cannot be written.
        """
        if not holds(*self.hold):
            raise taken_over(*self.hold)
        self.record = replace(self.record, **changes)
        self.folder.write(self.record.to_json())

    def train(self, job: Job, callbacks: Sequence[Any] = ()) -> Finished | None:
        """Train to the end and close the record.

        Args: callbacks: of Ray Train.
        Returns: how it ended, or None after SIGINT or SIGTERM, with `exit_status`.
        Raises: TrainingStopped, WorkersFailed; LockError if another run has taken over the folder.
        """
        if self.mirror is None:
            return self._train(job, callbacks)
        try:
            with self.mirror:
                return self._train(job, callbacks)
        except StoreError as error:
            where = f"{error} What it lacks is in {self.folder.path}, for the same command on this machine."
            if not self._is_interrupted:
                raise WorkersFailed(where) from error
            print(f"note: {where}", flush=True)
            return None

    def _train(self, job: Job, callbacks: Sequence[Any]) -> Finished | None:
        from mixmae.training.worker import fit

        arguments, folder, start = self.arguments, self.folder, time.monotonic()
        status, tags, metrics, step = "FAILED", {}, {}, 0
        progress = ProgressFile(folder.path, job.length.total_steps)
        try:
            with ProgressView(job.length.total_steps) as view:

                def receive(message: Message) -> None:
                    view.receive(message, folder)
                    self._keep(message, progress)
                    if message[0] == "evaluation":
                        job.draw_curves(folder.add_evaluation(message[1]))
                        for picture, title in job.pictures.items():
                            self._sender.keep(folder.path / picture, title)

                if self.mirror is not None:
                    self.mirror.owns_journal = False
                state, checkpoint = fit(
                    job,
                    folder=folder.path,
                    name="checkpoints",
                    workers=arguments.worker_range,
                    use_gpu=self.use_gpu,
                    max_failures=arguments.max_failures,
                    checkpoints_to_keep=arguments.checkpoints_to_keep,
                    runs_at_once=self.runs_at_once,
                    on_message=receive,
                    callbacks=callbacks,
                    may_write=partial(holds, *self.hold),
                    store=folder.store,
                )
            if self.mirror is not None:
                self.mirror.bring_results()
            status, tags, step = "FINISHED", {"checkpoint": checkpoint}, state.step
            metrics = job.final_metrics(state) | compared_with_plan(folder.path, state.metrics["images_per_s"])
            if "plan/reached" in metrics:
                print(
                    f"planned {metrics['plan/images_per_s']:.0f} images/s, ran at {metrics['plan/reached']:.2f} of it"
                )
        except KeyboardInterrupt as interruption:
            status, self._is_interrupted = "KILLED", True
            if self.mirror is not None:
                self.mirror.patience_s = HASTE_S
            self.exit_status = getattr(interruption, "exit_status", self.exit_status)
            print("\nInterrupted. The same command continues from the last checkpoint.", flush=True)
            return None
        except (TrainingStopped, WorkersFailed) as error:
            with contextlib.suppress(Exception):  # a full disk, a lost lock: what stopped the run is what to tell
                self.write(status="stopped" if isinstance(error, TrainingStopped) else "failed", reason=str(error))
            raise
        except FolderLost as error:
            raise taken_over(*self.hold) from error
        finally:
            self.end(status, tags=tags, metrics=metrics, step=step, pictures=job.pictures)
        self.write(status="finished", mlflow=job.ref, checkpoint=checkpoint, metrics={**state.metrics, **metrics})
        return Finished(state=state, checkpoint=checkpoint, metrics=metrics, seconds=time.monotonic() - start)

    def _keep(self, message: Message, progress: ProgressFile) -> None:
        """Write what pipelines/status.py reads, unless the folder is another run's by now."""
        with contextlib.suppress(OSError):  # training goes on without
            if holds(*self.hold):
                progress.receive(*message)

    @property
    def _sender(self) -> Sender:
        assert self.sender is not None, "track comes first"
        return self.sender

    def end(
        self,
        status: str,
        *,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        pictures: Mapping[str, str] | None = None,
    ) -> None:
        """Put the end of the run in the journal, and wait for seconds while MLflow gets the rest of it.

        If the folder is another run's by now, so is the run in MLflow: both are left alone.

        Args:
            status: FINISHED, FAILED or KILLED.
            metrics: the run's result, points at `step`.
            pictures: titles of files in the folder.
        """
        with contextlib.suppress(OSError):
            if not holds(*self.hold):
                return self._sender.leave()
        if self.mirror is not None:
            with contextlib.suppress(StoreError):  # the same comes again, with nothing after it that must be done
                self.mirror.take_journal()
        journal = Journal(self.folder.path)
        files: dict[str, str | None] = {self.folder.ledger.name: None, PLAN_FILE: None, **(pictures or {})}
        for name, title in files.items():
            if (self.folder.path / name).exists():
                journal.add(file=name, title=title)
        if metrics:
            journal.add_points(metrics, step)
        journal.add(status=status, tags=dict(tags or {}))
        journal.sync()
        if self.mirror is not None:
            with contextlib.suppress(StoreError):  # likewise
                self.mirror.finish()
        if left := self._sender.close():
            print(f"note: {left}", flush=True)
        else:
            self._send_left()

    def _send_left(self) -> None:
        """Give MLflow what it lacks of branches that were put aside; it answers."""
        if left := send_rest(self.folder.left):
            print(f"note: of what was put aside, {left}", flush=True)

    @property
    def ui_line(self) -> str:
        """How to open the run in a browser."""
        ref = self._sender.ref
        return f"MLflow UI   {ref.ui_command if ref else 'once MLflow has the run, see the note'}"

    def headline(self, job: Job) -> str:
        """What is trained, for how many steps, on what, where to."""
        doing, count = "Continuing" if self.is_continued else job.doing, self.arguments.worker_range
        workers = f"{count} {'GPU' if self.use_gpu else 'CPU'} worker{'s' * (count.most > 1)}"
        working = f", working in {self.folder.path}" if self.mirror else ""
        return (
            f"{doing} {self.record.recipe} on {job.source.name} ({job.source.num_rows} images): "
            f"{job.length.total_steps} steps of {job.loop.batch_size} images, {workers}\n"
            f"data {job.account.line}\n"
            f"output {self.folder.shown()}{working}\nMLflow {self.uri}"
        )

    def print_broken(self) -> None:
        """Print how many images could not be used, if any."""
        if broken := self.folder.broken():
            where = self.folder.shown(self.folder.ledger)
            print(f"{len(broken)} images could not be used and were replaced by others: {where}")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run ended."""

    state: TrainState
    checkpoint: str
    """Path of the last one."""
    metrics: Mapping[str, float]
    """The job's final ones."""
    seconds: float


def begin(arguments: RunArguments, recipe: str, *, inside: Hold | None = None, **known: Any) -> Run | None:
    """Take the output folder for a run, new or continued, until the command ends (pipelines/command.py).

    Args: inside: the sweep's lock, of a trial.  known: fields of the RunRecord beside recipe and config, which a
        continued run must have alike.
    Returns: the run, or None if it is finished, which is printed; then MLflow gets what it does not have of it.
    Raises: ValueError if the folder holds another run, or none to resume; LockError if another process runs it.
    """
    folder = output_folder(arguments, recipe)
    record = RunRecord(status="preparing", recipe=recipe, config=to_json(arguments.config), **known)
    before = _run_before(folder, record, arguments)
    mirror = None
    if before is None or before.status != "finished" or arguments.from_step is not None or folder.store is not None:
        hold = inside or _take(folder)
        if folder.store is not None:
            say = partial(print, "note:", flush=True)
            mirror = Mirror(folder.store, "driver", may_write=partial(holds, *hold), say=say)
        before = _run_before(folder, record, arguments)  # who had the lock may have written since
    if arguments.from_step is not None:
        before = go_back(folder, before, record, arguments.from_step)
    if before is not None:
        record = replace(record, branch=before.branch)
    if before is not None and before.status == "finished":
        print(f"This run is finished: {before.checkpoint}\nTo train again choose another --output.")
        _send_rest(folder, arguments.mlflow_uri)
        if mirror is not None:
            mirror.push()
        return None
    uri = resolve_uri(arguments.mlflow_uri, folder.path.parent)
    if before is None:
        folder.write(record.to_json())
    return Run(arguments=arguments, folder=folder, before=before, record=record, uri=uri, hold=hold, mirror=mirror)


def _take(folder: RunFolder) -> Hold:
    """Take the lock of a folder, and have here what there is in a store."""
    if folder.store is None:
        return take(folder.path).hold
    hold = store_lock.take(folder.store).hold
    folder.bring()
    return hold


def _run_before(folder: RunFolder, record: RunRecord, arguments: RunArguments) -> RunRecord | None:
    """The run in the folder, which is the same as `record`; None if it has none that was begun.   Raises: as begin."""
    before = read_begun(folder)
    if before is None and arguments.resume:
        raise ValueError(
            f"{folder.shown()} holds no run to resume: correct --output, or leave --resume out to start one."
        )
    if before is not None:
        before = replace(before, config=completed(before.config, arguments.config))
    refuse_changes(before, record, folder.shown(), BRANCHABLE if arguments.from_step is not None else frozenset())
    return before


def go_back(folder: RunFolder, before: RunRecord | None, now: RunRecord, step: int) -> RunRecord:
    """Put aside what a run did after a step, so that it goes on from there, as another run in MLflow.

    Returns: the run's record as if it had been interrupted then; the same as before if it has gone back already.
    Raises: ValueError if there is no such run, or no whole checkpoint of this step.
    """
    if before is None:
        raise ValueError(f"{folder.shown()} holds no run to go back in: correct --output, or leave --from-step out.")
    if before.branch and before.branch["step"] == step and not differences(before.config, now.config):
        return before
    kept = folder.checkpoints()
    if step not in map(step_of, kept):
        there = ", ".join(str(step_of(path)) for path in reversed(kept)) or "none"
        raise ValueError(
            f"there is no checkpoint of step {step} in {folder.shown()}: --from-step may be one of {there}."
        )
    verify(folder.checkpoint(step))
    mark_ended(folder.path, "KILLED")
    aside = folder.put_aside(step)
    print(f"going back to step {step}; what came after it is in {folder.shown(aside)}")
    branch = {"step": step, "run_id": before.mlflow.run_id if before.mlflow else ""}
    record = replace(before, status="running", config=now.config, branch=branch, mlflow=None, metrics={}, reason="")
    folder.write(record.to_json())
    return record


def _send_rest(folder: RunFolder, uri: str | None) -> None:
    """Give MLflow what it lacks of a finished run, or of its parts, and say what came of it."""
    parts = (folder.path, *folder.left, *sorted(folder.path.glob("trials/*")))
    behind = [path for path in parts if unsent(path)]
    if not behind:
        return
    count = sum(map(backlog, behind))
    left = send_rest(behind, None if uri is None else resolve_uri(uri, folder.path.parent))
    print(f"note: {left or f'MLflow was behind; it has got {count} points and the end of the run now.'}", flush=True)


def refuse_changes(
    before: RunRecord | None, now: RunRecord, path: str, may_change: frozenset[str] = frozenset()
) -> None:
    """Raise ValueError if a run that was begun would be continued as another one, as far as is known now.

    Args: may_change: fields of the config that may differ, beside those that always may.
    """
    if before is None:
        return
    changed = [change for change in differences(before.config, now.config) if change.split()[0] not in may_change]
    if before.data and now.data and before.data.digest != now.data.digest and not _digests_differ_in_kind(before, now):
        changed.append(f"data was {before.data.name} ({before.data.digest}) and is {now.data.name}")
    digests = [record.pretrained.digest if record.pretrained else None for record in (before, now)]
    if digests[0] != digests[1]:
        was, is_now = (record.pretrained.path if record.pretrained else "none" for record in (before, now))
        changed.append(f"pretrained was {was} and is {is_now if was != is_now else 'another file there'}")
    if before.classes is not None and now.classes is not None and list(before.classes) != list(now.classes):
        changed.append(f"the head has {len(before.classes)} classes and the data {len(now.classes)} or others")
    if before.space != now.space:
        both = before.space and now.space
        changed.append("the search space is another one" if both else "only one of the two is a sweep")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{path} holds a run begun with other settings ({'; '.join(changed[:3])}{more}): continue it with the "
            "ones it was begun with, or choose another --output."
        )


def _digests_differ_in_kind(before: RunRecord, now: RunRecord) -> bool:
    """Whether the run was begun when digests were of names and sizes, and cannot be compared."""
    assert before.data is not None
    assert now.data is not None
    older = len(before.data.digest) < len(now.data.digest)
    if older:
        print("note: this run was begun by an earlier version, which did not record the contents of its data")
    return older


def _table(met: Account) -> dict[str, list[Any]]:
    """An account as the columns of a table."""
    rows: list[tuple[str, int, str, str]] = [(f"{split} images", count, "", "") for split, count in met.images.items()]
    rows += [(f"{split} images with a class", count, "", "") for split, count in met.labelled.items()]
    rows += [("classes", met.num_classes, "", "")]
    rows += [(f"{kind} looked at", count, "", "") for kind, count in met.looked_at.items()]
    rows += [(note.what, note.count, note.example, note.remedy) for note in met.notes]
    return dict(zip(("what", "count", "example", "remedy"), map(list, zip(*rows, strict=True)), strict=True))
