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
    if space.search == "optuna":
        values: Any = {name: _domain(dimension) for name, dimension in space.vary.items()}
    else:
        values = tune.grid_search(space.points(shared.arguments.config.loop.seed))
    return tune.Tuner(
        trainable,
        param_space={"values": values},
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            num_samples=space.num_trials if space.search == "optuna" else 1,
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
            callbacks=[Progress(space.num_trials, shared.folder, space.metric)],
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


def _scheduler(shared: Sweep) -> AsyncHyperBandScheduler | None:
    """Who stops trials early; None: nobody."""
    asha, length = shared.space.scheduler, shared.job.length
    if asha is None:
        return None
    return AsyncHyperBandScheduler(
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
    from ray.tune.search.optuna import OptunaSearch

    space = shared.space
    search = OptunaSearch(metric=space.metric, mode=space.mode, seed=shared.arguments.config.loop.seed)
    return ConcurrencyLimiter(search, max_concurrent=shared.arguments.max_concurrent)
