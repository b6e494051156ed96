"""One trial of a sweep: the run of finetuning or pretraining that it is, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from mixmae.data.source import Source
from mixmae.jobs.config import FinetuneConfig, PretrainConfig
from mixmae.tracking import RunRef, finish_run, metric_history
from mixmae.training.checkpoint import read_state
from mixmae.training.loop import TrainingStopped, TrainState
from pipelines import finetune
from pipelines.finetune import INITIAL_FILE, FinetuneJob, results
from pipelines.pretrain import PretrainJob, Probe, final_metrics
from pipelines.runs import Run, RunFolder, begin, length_of
from pipelines.sweeping.results import TrialResult, label
from tune_spaces.fields import set_fields
from tune_spaces.space import Space, final_name


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line: where to read, where to write, how much at once, for how long."""

    config: Annotated[FinetuneConfig | PretrainConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]
    """The fields of the space's recipe; any of them that does not vary can be changed."""
    workers: Annotated[int, tyro.conf.arg(name="workers-per-trial")] = 1
    """Training processes of each trial: one a GPU, or some on CPU."""
    max_concurrent: int = 1
    """Trials at once."""
    trials: int | None = None
    """How many trials a space that draws them has. Default: what the space says."""
    hours: float | None = None
    """After these, counted from this start, trials end where they are. Default: what the space says."""
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
    """All that the trials share; travels to each of them by pickle."""

    arguments: Arguments
    space: Space
    source: Source
    validation: Source
    """Of pretraining, the held-out images."""
    classes: list[str]
    """Of finetuning."""
    probe: Probe | None
    """Of pretraining."""
    folder: Path
    pretrained: dict[str, Any] | None
    run: RunRef
    """The parent."""
    use_gpu: bool


def trial_folder(folder: Path, trial_id: str) -> Path:
    """A trial's run folder; the id stays the same when a sweep is continued."""
    return folder / "trials" / trial_id


def run_trial(config: dict[str, Any], *, shared: Sweep) -> None:
    """One run, in a process of Tune's: what `finetune` or `pretrain` does, with what the driver has prepared.

    Raises: WorkersFailed, after which Tune tries again, from the last checkpoint.
    """
    trial_id, values = tune.get_context().get_trial_id(), config["values"]
    arguments = replace(
        shared.arguments,
        config=set_fields(shared.arguments.config, values),
        output=trial_folder(shared.folder, trial_id),
        mlflow_uri=shared.run.uri,
        run_name=label(values),
        max_failures=0,  # Tune starts the trial again, should this process die or its workers
    )
    before = RunFolder(trial_folder(shared.folder, trial_id)).read() or {}
    if before.get("status") in ("finished", "stopped"):  # Tune had not heard of it
        tune.report(before.get("metrics", {}))
        return
    run = begin(arguments, shared.space.recipe, {"pretrained": shared.pretrained, "trial": values})
    assert run is not None
    run.use_gpu = shared.use_gpu
    make_job = _pretraining if isinstance(arguments.config, PretrainConfig) else _finetuning
    job, finals = make_job(shared, arguments.config, run, {"trial": trial_id})
    try:
        run.train(job, job.run, finals, [TuneReportCallback()])
    except TrainingStopped as stop:  # a result, not a failure: another start would not help
        run.folder.write(run.content | {"status": "stopped", "reason": str(stop)})
        tune.report({"stopped": True})  # Tune prints a line of its own for a trial that never reports


Finals = Callable[[TrainState], dict[str, float]]
"""The metrics of a finished run, from its state."""


def _finetuning(shared: Sweep, config: Any, run: Run, tags: dict[str, str]) -> tuple[FinetuneJob, Finals]:
    run.content["classes"] = run.facts["classes"] = shared.classes
    run.settle_data(shared.source)
    job = FinetuneJob(
        config=config,
        source=shared.source,
        validation=shared.validation,
        num_classes=len(shared.classes),
        folder=run.folder.path,
        initial=shared.folder / INITIAL_FILE if shared.pretrained else None,
        run=run.track(
            length_of(config, shared.source),
            params={"classes": len(shared.classes)},
            tags={"stage": "finetune", **tags, **pretrained_tags(shared.pretrained)},
            parent_run_id=shared.run.run_id,
        ),
        facts=run.facts,
    )
    return job, lambda state: results(state, run)


def _pretraining(shared: Sweep, config: Any, run: Run, tags: dict[str, str]) -> tuple[PretrainJob, Finals]:
    assert shared.probe is not None
    run.settle_data(shared.source)
    job = PretrainJob(
        config=config,
        source=shared.source,
        heldout=shared.validation,
        probe=shared.probe,
        run=run.track(
            length_of(config, shared.source),
            tags={"stage": "pretrain", "probe": shared.probe.description, **tags},
            parent_run_id=shared.run.run_id,
        ),
        facts=run.facts,
    )
    return job, final_metrics


def pretrained_tags(pretrained: dict[str, Any] | None) -> dict[str, str]:
    """What MLflow's runs say of the weights that they start from."""
    if pretrained is None:
        return {"pretrained": "none"}
    tags = {"pretrained": str(pretrained["path"])}
    return tags | ({"pretrained.run_id": pretrained["run_id"]} if pretrained["run_id"] else {})


def last_line(error: object) -> str:
    """Of an exception that Ray passed on, the line that says what happened."""
    return (str(error).strip().splitlines() or ["?"])[-1]


def result_of(shared: Sweep, trial: Any) -> TrialResult:
    """How a trial ended, from Tune and from what it left in its folder; a halted one's MLflow run is ended."""
    last = trial.last_result or {}
    place = RunFolder(trial_folder(shared.folder, trial.trial_id))
    content = place.read() or {}
    ref = RunRef(**content["mlflow"]) if "mlflow" in content else None
    status, reason, metrics = content.get("status"), "", content.get("metrics", {})
    if status == "stopped":
        reason = content["reason"]
    elif status != "finished" and trial.status == "ERROR":
        status, reason = "failed", last_line(trial.get_error())
    elif status != "finished":
        status, reason = ("halted", f"after epoch {last.get('epoch', 0):.2f}") if ref else ("not run", "")
    elif shared.space.final_metric not in metrics:  # a probe that could not be made
        status, reason = "stopped", f"it ended without {shared.space.metric}"
    if status == "halted":
        metrics = {final_name(name): value for name, value in last.items() if name.startswith(("val/", "probe/"))}
    if status in ("halted", "stopped") and (place.best / "state.json").is_file():
        best = read_state(place.best)["metrics"]
        metrics = dict(metrics) | {name.replace("val/", "best/"): value for name, value in best.items()}
    metrics = {name: float(value) for name, value in metrics.items() if name.startswith(("final/", "best/"))}
    if ref is not None and status in ("halted", "stopped"):
        with contextlib.suppress(Exception):  # the store's trouble must not hide the results
            ended = "FINISHED" if status == "halted" else "FAILED"
            finish_run(ref, status=ended, tags={status: reason}, metrics=metrics)
    return TrialResult(
        trial=trial.trial_id,
        values=trial.config["values"],
        status=cast(Any, status),
        reason=reason,
        metrics=metrics,
        run_id=ref.run_id if ref else "",
    )


def curve(shared: Sweep, result: TrialResult) -> list[tuple[int, float]]:
    """The points of a trial's metric."""
    if not result.run_id:
        return []
    return metric_history(replace(shared.run, run_id=result.run_id), shared.space.metric)
