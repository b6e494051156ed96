"""One trial of a sweep: the run of finetuning or pretraining that it is, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from mixmae.jobs.config import DetectConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.record import Pretrained, RunRecord, read_record
from mixmae.jobs.supervised import SupervisedJob
from mixmae.lock import Hold
from mixmae.tracking import RunRef, end_later, metric_history, points
from mixmae.training.checkpoint import read_state
from mixmae.training.failures import TrainingStopped
from mixmae.training.run_folder import RunFolder
from pipelines import finetune
from pipelines.run import begin
from pipelines.sweeping.results import FROM_SCRATCH, TrialResult, label
from tune_spaces.fields import get_field, set_fields
from tune_spaces.space import Space, final_name


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line of a sweep: where to read, where to write, how much at once, for how long."""

    config: Annotated[  # type: ignore[assignment]
        FinetuneConfig | SegmentConfig | DetectConfig | PretrainConfig, tyro.conf.arg(name="")
    ]
    """The fields of the space's recipe; any of them that does not vary can be changed."""
    workers: Annotated[int, tyro.conf.arg(name="workers-per-trial")] = 1
    """Training processes of each trial: one per GPU, or some on CPU. 0: all GPUs or cores for one trial at a time."""
    max_concurrent: int = 0
    """Trials at once. 0: as many as this machine has GPUs, or else cores, for their workers; on a cluster 1."""
    trials: int | None = None
    """How many trials a space that draws them has. Default: the space's own number."""
    hours: float | None = None
    """After these, counted from this start, trials end where they are. Default: the space's own budget."""
    reference: bool = True
    """Train once from scratch, too, for as many steps, as the reference of trials that start from --pretrained."""
    register_model: str | None = None
    """Name of a model in MLflow's registry that the winner becomes the next version of, with the alias "best"."""
    experiment: str = "mixmae-sweep"
    """MLflow experiment."""
    max_failures: int = 3
    """Restarts of a trial from its last checkpoint, after a worker died, before it counts as failed."""
    checkpoints_to_keep: int = 1
    """Newest checkpoints that each trial keeps, beside its best weights."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that the trials share; pickled to each of them."""

    arguments: Arguments
    space: Space
    job: SupervisedJob | PretrainJob
    """Of the config without the values that vary."""
    folder: Path
    pretrained: Pretrained | None
    """The weights that all trials start from; None: from scratch."""
    reference: Mapping[str, Any] | None
    """Fields of the reference, by dotted name; None: there is no reference."""
    run: RunRef
    """The parent."""
    use_gpu: bool
    hold: Hold
    """The sweep's lock, which its trials are inside of."""

    def fields_of(self, values: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The fields, by dotted name, that a trial does not share with the others.   Args: values: as Tune has them."""
        if values is None:
            assert self.reference is not None
            return self.reference
        return values


def trial_folder(folder: Path, trial_id: str) -> Path:
    """A trial's run folder; the id stays the same when a sweep is continued."""
    return folder / "trials" / trial_id


def run_trial(config: dict[str, Any], *, shared: Sweep) -> None:
    """One run, in a process of Tune's: what pretrain.py or finetune.py does, on the data that the driver has opened.

    Raises: WorkersFailed, after which Tune tries again, from the last checkpoint.
    """
    trial_id, values = tune.get_context().get_trial_id(), config["values"]
    is_reference = values is None
    folder = trial_folder(shared.folder, trial_id)
    before = read_record(RunFolder(folder))
    if before is not None and before.status in ("finished", "stopped"):  # Tune does not know it yet
        tune.report(dict(before.metrics))
        return
    arguments = replace(
        shared.arguments,
        config=set_fields(shared.arguments.config, shared.fields_of(values)),
        output=folder,
        mlflow_uri=shared.run.uri,
        run_name=label(values),
        max_failures=0,  # Tune starts the trial again, should this process die or its workers
    )
    pretrained = None if is_reference else shared.pretrained
    fields = shared.fields_of(values)
    run = begin(arguments, shared.space.recipe, inside=shared.hold, pretrained=pretrained, trial=fields)
    assert run is not None
    run.use_gpu, run.runs_at_once = shared.use_gpu, arguments.max_concurrent
    job = run.record_data(shared.job.of_trial(arguments.config, run.folder.path))
    tags = {"trial": trial_id}
    if is_reference:
        assert isinstance(job, SupervisedJob)
        job, tags = replace(job, pretrained=None, initial=None), {**tags, "reference": FROM_SCRATCH}
    job = run.track(job, tags=tags, parent_run_id=shared.run.run_id)
    try:
        run.train(job, [TuneReportCallback()])
    except TrainingStopped as stop:  # a result, not a failure: another start would not help
        run.write(status="stopped", reason=str(stop))
        tune.report({"stopped": True})  # Tune prints a line of its own for a trial that never reports


def last_line(error: object) -> str:
    """Of an exception that Ray passed on, the line that tells what happened."""
    return (str(error).strip().splitlines() or ["?"])[-1]


def result_of(shared: Sweep, trial: Any) -> TrialResult:
    """How a trial ended, from Tune and from its folder; of a halted one the end is put in its journal."""
    last = trial.last_result or {}
    folder = RunFolder(trial_folder(shared.folder, trial.trial_id))
    record = read_record(folder)
    ref = record.mlflow if record else None
    status, reason = _ending(shared.space, trial, record)
    metrics = dict(record.metrics) if record else {}
    if status == "halted":
        metrics = {final_name(name): value for name, value in last.items() if name.startswith(("val/", "probe/"))}
    if status in ("halted", "stopped") and (folder.best / "state.json").is_file():
        best = read_state(folder.best)["metrics"]
        metrics |= {name.replace("val/", "best/"): value for name, value in best.items()}
    metrics = {name: float(value) for name, value in metrics.items() if name.startswith(("final/", "best/"))}
    if record is not None and record.is_begun and status in ("halted", "stopped"):
        ended, step = "FINISHED" if status == "halted" else "FAILED", int(last.get("step", 0))
        end_later(folder.path, ref, status=ended, tags={status: reason}, metrics=metrics, step=step)
    config = set_fields(shared.arguments.config, shared.fields_of(trial.config["values"]))
    return TrialResult(
        trial=trial.trial_id,
        values={name: get_field(config, name) for name in shared.space.vary},
        is_reference=trial.config["values"] is None,
        status=cast(Any, status),
        reason=reason,
        metrics=metrics,
        run_id=ref.run_id if ref else "",
    )


def _ending(space: Space, trial: Any, record: RunRecord | None) -> tuple[str, str]:
    """A trial's status in the results, and the reason where it is not finished."""
    if record is not None and record.status == "stopped":
        return "stopped", record.reason
    if record is not None and record.status == "finished":
        if space.final_metric not in record.metrics:  # a probe that could not be made
            return "stopped", f"it ended without {space.metric}"
        return "finished", ""
    if trial.status == "ERROR":
        return "failed", last_line(trial.get_error())
    if record is None or not record.is_begun:
        return "not run", ""
    return "halted", f"after epoch {(trial.last_result or {}).get('epoch', 0):.2f}"


def curve(shared: Sweep, result: TrialResult) -> list[tuple[int, float]]:
    """The points (step, value) of the metric that the trials are ranked by."""
    found = points(trial_folder(shared.folder, result.trial), shared.space.metric)
    if not found and result.run_id:  # a trial that is older than journals
        return metric_history(replace(shared.run, run_id=result.run_id), shared.space.metric)
    return found
