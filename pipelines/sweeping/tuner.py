"""Ray Tune's part of a sweep: which trials there are, how many run at once, and how it is continued."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from mixmae.training.cluster import ClusterError, join
from pipelines.sweeping import progress
from pipelines.sweeping.progress import Progress
from pipelines.sweeping.trial import Arguments, Sweep, run_trial
from tune_spaces.space import Choice, Space, Uniform

SLOT = "trial_slot"
"""The cluster's resource that says how many trials may run at once. (Tune's own limit is forgotten by a restore.)"""
TRIAL_CPUS = 0.5
"""What a trial's own process asks for; its workers ask for themselves."""
TUNE_FOLDER = "tune"
"""Tune's own files, in the sweep's folder."""
FORMER_MODULES = {"pipelines.sweep_progress": progress}
"""Modules that the files of earlier sweeps name their pickled objects by, and where these are now."""


def join_cluster(arguments: Arguments, space: Space) -> tuple[bool, float]:
    """Join or start Ray and check that it can hold the trials.

    Returns: whether workers use a GPU each, and how many slots a trial takes.
    Raises: ClusterError.
    """
    at_once = arguments.max_concurrent
    use_gpu = join(
        arguments.ray_address,
        num_workers=arguments.workers,
        device=arguments.device,
        num_trials=at_once,
        slots={SLOT: at_once},
        # Trials may be ended from outside; Ray frees their workers only where it has a dashboard.
        dashboard=space.scheduler is not None or space.hours is not None,
    )
    slots = int(ray.cluster_resources().get(SLOT, 0))
    if slots < at_once:
        raise ClusterError(
            f"The cluster has {slots} of the resource {SLOT}, which limits how many trials run at once, and "
            f"--max-concurrent is {at_once}: start its head with `ray start --head --resources "
            f"'{{\"{SLOT}\": {at_once}}}'`."
        )
    return use_gpu, slots // at_once


def make_tuner(shared: Sweep, slots: float) -> tune.Tuner:
    """Tune's run over the trials: the one that was interrupted, or a new one.   Args: slots: that each trial takes."""
    # Tune's own handler of Ctrl-C would wait for trials and call the rest finished.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that diverges at once has no metric
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow has the curves
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the old one can be silenced
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Progress prints what fails, in a line
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), {"CPU": TRIAL_CPUS, SLOT: slots})
    folder, space = shared.folder / TUNE_FOLDER, shared.space
    budget_s = None if space.hours is None else space.hours * 3600
    if tune.Tuner.can_restore(str(folder)) and any(folder.glob("experiment_state-*.json")):
        return _restore(folder, trainable, budget_s)
    reference = [] if shared.reference is None else [None]  # its values, as Tune has them: first, it is always there
    if space.search == "optuna":
        values: Any = {name: _domain(dimension) for name, dimension in space.vary.items()}
    else:
        points: list[Any] = list(space.points(shared.arguments.config.loop.seed))
        values = tune.grid_search([*reference, *points])
    return tune.Tuner(
        trainable,
        param_space={"values": values},
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            num_samples=space.num_trials + len(reference) if space.search == "optuna" else 1,
            search_alg=_optuna(shared) if space.search == "optuna" else None,
            scheduler=_scheduler(shared),
            time_budget_s=budget_s,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(shared.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=shared.arguments.max_failures),
            callbacks=[Progress(space.num_trials + len(reference), shared.folder, space.metric)],
        ),
    )


def know_former_modules() -> None:
    """Let pickle find what the files of earlier sweeps name."""
    for name, module in FORMER_MODULES.items():
        sys.modules.setdefault(name, module)


def _restore(folder: Path, trainable: Any, budget_s: float | None) -> tune.Tuner:
    know_former_modules()
    tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, resume_errored=True)
    # What is kept is the budget of the first start; restore has no argument for another one.
    tuner._local_tuner._tune_config.time_budget_s = budget_s  # type: ignore[union-attr]
    return tuner


class AshaOfTrials(AsyncHyperBandScheduler):
    """ASHA that leaves the reference alone: it is not stopped, and no trial is compared with it."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop the trial or not."""
        if trial.config["values"] is None:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Remember how good it was."""
        if trial.config["values"] is not None:
            super().on_trial_complete(tune_controller, trial, result)


class OptunaOfTrials(OptunaSearch):
    """Optuna that has the reference run first and learns nothing from it.   Args: reference: whether there is one."""

    def __init__(self, *, reference: bool, **options: Any) -> None:
        super().__init__(**options)
        self._wants_reference, self._reference_id = reference, ""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The values of a new trial."""
        if self._wants_reference and self._reference_id in ("", trial_id):
            self._reference_id = trial_id
            return {"values": None}
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn from a trial under way."""
        if trial_id != self._reference_id:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn from a trial that has ended."""
        if trial_id != self._reference_id:
            super().on_trial_complete(trial_id, result, error)


def _scheduler(shared: Sweep) -> AshaOfTrials | None:
    """Who stops trials early; None: nobody."""
    asha, length = shared.space.scheduler, shared.job.length
    if asha is None:
        return None
    return AshaOfTrials(
        time_attr="epoch",
        # Just below the end: no trial is stopped while it closes its record.
        max_t=0.999 * length.total_steps / length.steps_per_epoch,  # type: ignore[arg-type]
        stop_last_trials=False,
        grace_period=asha.grace_epochs,  # type: ignore[arg-type]
        reduction_factor=asha.reduction,
    )


def _domain(dimension: Choice | Uniform) -> Any:
    """A dimension of the space as Tune draws from it."""
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)


def _optuna(shared: Sweep) -> Searcher:
    space, seed = shared.space, shared.arguments.config.loop.seed
    search = OptunaOfTrials(reference=shared.reference is not None, metric=space.metric, mode=space.mode, seed=seed)
    return ConcurrencyLimiter(search, max_concurrent=shared.arguments.max_concurrent)
