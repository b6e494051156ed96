"""Try many settings of a finetuning, or of a pretraining, and say which is best.

Ray Tune chooses the trials, each of which is a run of its own on Ray Train; MLflow keeps one parent run a sweep and a
child run a trial. Trials of pretraining start from nothing and are judged by their probe on labelled images.

    python pipelines/sweep.py SPACE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers-per-trial N]
        [--max-concurrent N] [--trials N] [--hours H] [any field of the space's recipe]

The same command again continues a sweep that was interrupted: no finished trial runs again, one that was under way
continues from its checkpoint, and one whose workers failed is tried once more.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from mixmae.data.blocks import eval_batch
from mixmae.data.source import DataError
from mixmae.finetune.classification import Predictor
from mixmae.jobs.config import FinetuneConfig, PretrainConfig, to_json
from mixmae.tracking import (
    NOTE_TAG,
    RunRef,
    claim_model_name,
    create_run,
    finish_run,
    log_file,
    log_table,
    model_link,
    register_model,
    save_view,
    tag_run,
)
from mixmae.training.worker import ClusterError, choose_device, connect, require_resources
from pipelines.evaluate import load_classifier
from pipelines.finetune import HELDOUT_IMAGES, keep_initial, take_classes, take_pretrained
from pipelines.pretrain import HELDOUT_IMAGES as PRETRAIN_HELDOUT_IMAGES
from pipelines.pretrain import check_method, choose_probe
from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES
from pipelines.runs import (
    Run,
    begin,
    elapsed_since,
    length_of,
    open_data,
    run_command,
    run_folder,
    versions,
    weights_of,
)
from pipelines.sweeping.progress import Progress
from pipelines.sweeping.results import (
    draw_curves,
    draw_heat_map,
    label,
    link_line,
    print_table,
    rank,
    rows_of,
    write_csv,
    write_note,
)
from pipelines.sweeping.trial import (
    Arguments,
    Sweep,
    curve,
    pretrained_tags,
    result_of,
    run_trial,
    trial_folder,
)
from tune_spaces import SPACES
from tune_spaces.fields import get_field, set_fields
from tune_spaces.space import Choice, Space, Uniform

SLOT = "trial_slot"
"""The cluster's resource that says how many trials may run at once. (Tune's own limit is forgotten by a restore.)"""
TRIAL_CPUS = 0.5
"""What a trial's own process asks for; its workers ask for themselves."""
TUNE_FOLDER = "tune"
"""Tune's own files, in the sweep's folder."""
PLAIN_NAMES = ("layer_decay", "drop_path", "weight_decay")
"""Fields that runs log without their dots (pipelines/runs.py)."""


def sweep(arguments: Arguments, name: str) -> int:
    """Run or continue a sweep.   Returns: the process's exit status."""
    space = choose_space(arguments, name)
    # The folder has the sweep's name, not the recipe's.
    arguments = replace(arguments, output=run_folder(arguments, f"sweep_{name}").path)
    pretrained = None
    if isinstance(arguments.config, FinetuneConfig):
        pretrained, with_encoder = take_pretrained(arguments, space.recipe)
        arguments = cast(Arguments, with_encoder)
    check_trials(space, arguments)
    content: dict[str, Any] = {"pretrained": pretrained and pretrained.to_json(), "space": space.to_json()}
    if isinstance(arguments.config, PretrainConfig):  # trials are judged by it, and must be judged alike
        content["space"]["probe"] = vars(arguments.config.probe)
    run = begin(arguments, name, content)
    if run is None:
        return 0
    if arguments.register_model is not None:
        claim_model_name(run.uri, arguments.register_model)
    folder = run.folder.path
    config = arguments.config
    heldout_images = HELDOUT_IMAGES if isinstance(config, FinetuneConfig) else PRETRAIN_HELDOUT_IMAGES
    source, validation = open_data(arguments.data, folder.parent / "data", heldout_images)
    classes, probe = [], None
    if isinstance(config, PretrainConfig):
        probe = choose_probe(config.probe, source, validation)
        if probe is None:
            raise DataError(
                f"the trials cannot be judged on {source.name}, see the note: give a set with labels (docs/data.md)."
            )
    else:
        run.content["classes"] = classes = take_classes(source, validation)
    run.settle_data(source)
    if isinstance(config, FinetuneConfig):
        if pretrained is None:
            print("note: no --pretrained weights: every trial trains from scratch")
        elif pretrained.weights is not None:
            keep_initial(pretrained, config, folder)
    use_gpu, slots = claim_cluster(arguments, stops_trials=space.scheduler is not None or space.hours is not None)
    parent, links = open_parent(run, space)
    shared = Sweep(
        arguments=arguments,
        space=space,
        source=source,
        validation=validation,
        classes=classes,
        probe=probe,
        folder=folder,
        pretrained=run.content["pretrained"],
        run=parent,
        use_gpu=use_gpu,
    )
    length = length_of(arguments.config, source)
    print(
        f"{'Continuing' if run.is_continued else 'Sweeping'} {name}: {space.num_trials} trials of {space.recipe} on "
        f"{source.name} ({source.num_rows} images), {length.total_steps} steps each unless it varies, "
        f"{arguments.max_concurrent} at once\noutput {folder}\nMLflow {run.uri}",
        flush=True,
    )
    start = time.monotonic()
    try:
        make_tuner(shared, slots).fit()
    except KeyboardInterrupt:
        close_children(shared)
        finish_run(shared.run, status="KILLED")
        print("\nInterrupted. The same command continues.", flush=True)
        return 130
    return conclude(run, shared, start, links)


def choose_space(arguments: Arguments, name: str) -> Space:
    """The space with the budget of the command line.   Raises: ValueError for what cannot be swept like this."""
    space = SPACES[name]
    if arguments.trials is not None:
        space = replace(space, trials=arguments.trials)
    if arguments.hours is not None:
        space = replace(space, hours=arguments.hours)
    if arguments.max_concurrent < 1:
        raise ValueError(f"--max-concurrent is {arguments.max_concurrent}: it must be at least 1.")
    usual = base_config(space)
    pretrains = isinstance(usual, PretrainConfig)
    if pretrains != space.pretrains:
        raise ValueError(
            f"the space ranks by {space.metric}, which {space.recipe} does not have: pretraining has probe/knn_top1 "
            "and probe/linear_top1, finetuning val/top1, val/top5 and val/loss."
        )
    if pretrains and (arguments.pretrained or arguments.register_model):
        raise ValueError(
            f"the trials of {name} are pretraining, from nothing to an encoder: leave out --pretrained and "
            "--register-model."
        )
    if isinstance(arguments.config, PretrainConfig) and arguments.config.probe.images == 0:
        raise ValueError(f"the trials of {name} are judged by their probe: --probe.images cannot be 0.")
    space.check(usual)
    for field in space.vary:
        if get_field(arguments.config, field) != get_field(usual, field):
            raise ValueError(f"{field} varies in the space {name}: leave its flag out, or take another space.")
    if space.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ValueError(f"the space {name} is searched by Optuna, which is not installed: pip install 'mixmae[sweep]'")
    return space


def check_trials(space: Space, arguments: Arguments) -> None:
    """See that every trial can be trained like this.   Raises: ValueError."""
    space.check(arguments.config)
    for point in space.points(arguments.config.loop.seed):
        config = set_fields(arguments.config, point)
        config.micro_batch(arguments.workers)
        if isinstance(config, PretrainConfig):
            check_method(config)


def base_config(space: Space) -> FinetuneConfig | PretrainConfig:
    """The config that all trials start from."""
    recipes: dict[str, Callable[[], Any]] = {**FINETUNE_RECIPES, **PRETRAIN_RECIPES}
    if space.recipe not in recipes:
        near = difflib.get_close_matches(space.recipe, recipes, n=3, cutoff=0.4)
        raise ValueError(f"there is no recipe {space.recipe!r}: did you mean {' or '.join(near or recipes)}?")
    return set_fields(recipes[space.recipe](), space.change)


def claim_cluster(arguments: Arguments, *, stops_trials: bool) -> tuple[bool, float]:
    """Join or start Ray and see that it can hold the trials.

    Args: stops_trials: a trial may be ended from outside; Ray frees its workers only where it has a dashboard.
    Returns: whether workers use a GPU each, and how many slots a trial takes.
    Raises: ClusterError.
    """
    at_once, workers = arguments.max_concurrent, arguments.workers
    connect(arguments.ray_address, num_workers=at_once * (workers + 1), slots={SLOT: at_once}, dashboard=stops_trials)
    slots = int(ray.cluster_resources().get(SLOT, 0))
    if slots < at_once:
        raise ClusterError(
            f"The cluster has {slots} of the resource {SLOT}, which limits how many trials run at once, and "
            f"--max-concurrent is {at_once}: start its head with `ray start --head --resources "
            f"'{{\"{SLOT}\": {at_once}}}'`."
        )
    use_gpu = choose_device(arguments.device)
    require_resources(num_workers=at_once * workers, use_gpu=use_gpu)
    return use_gpu, slots // at_once


def open_parent(run: Run, space: Space) -> tuple[RunRef, dict[str, str]]:
    """The sweep's MLflow run; without the trials' numbers among its parameters, as it is no point of their plots.

    Returns: the run, and by their words the links of its description.
    """
    arguments, pretrained = run.arguments, run.content["pretrained"]
    name = arguments.run_name or run.folder.path.name
    ref = run.reopen() or create_run(
        uri=run.uri,
        experiment=arguments.experiment,
        name=name,
        params={"space": run.recipe, **space.to_json()},
        tags={
            "stage": "sweep",
            **pretrained_tags(pretrained),
            "output": str(run.folder.path),
            **{f"version.{name}": number for name, number in versions().items()},
        },
        dataset=run.content["data"],
    )
    run.content |= {"status": "running", "mlflow": vars(ref)}
    run.folder.write(run.content)
    shown = [field if (short := field.rpartition(".")[2]) not in PLAIN_NAMES else short for field in space.vary]
    metrics = [space.final_metric]
    if isinstance(arguments.config, FinetuneConfig):
        metrics.append(space.final_metric.replace("final/", "best/"))
    table, axes = save_view(ref, f"trials of {name}", params=shown, metrics=metrics, descending=space.mode == "max")
    links = {"all trials, ranked": table, "parallel coordinates": axes}
    if pretrained and pretrained["run_id"]:
        theirs = tag_run(ref.uri, pretrained["run_id"], f"swept.{ref.run_id}", name)
        links |= {"pretraining": theirs.link} if theirs else {}
    tag_run(ref.uri, ref.run_id, NOTE_TAG, f"Under way: {link_line(links)}")
    return ref, links


def make_tuner(shared: Sweep, slots: float) -> tune.Tuner:
    """Tune's run over the trials: the one that was interrupted, or a new one."""
    # Tune's own handler of Ctrl-C would wait for trials and call the rest finished.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that diverges at once has no metric
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow has the curves
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the old one keeps still when told to
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Progress says what fails, in a line
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), {"CPU": TRIAL_CPUS, SLOT: slots})
    place = shared.folder / TUNE_FOLDER
    space, arguments = shared.space, shared.arguments
    budget_s = None if space.hours is None else space.hours * 3600
    if tune.Tuner.can_restore(str(place)) and any(place.glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(place), trainable, resume_unfinished=True, resume_errored=True)
        # What is kept is the budget of the first start; restore has no argument for another one.
        tuner._local_tuner._tune_config.time_budget_s = budget_s  # type: ignore[union-attr]
        return tuner
    if space.search == "optuna":
        values: Any = {name: _tune_domain(dimension) for name, dimension in space.vary.items()}
    else:
        values = tune.grid_search(space.points(arguments.config.loop.seed))
    scheduler = None
    if space.scheduler is not None:
        length = length_of(arguments.config, shared.source)
        scheduler = AsyncHyperBandScheduler(
            time_attr="epoch",
            # Just below the end: no trial is stopped while it closes its books.
            max_t=0.999 * length.total_steps / length.steps_per_epoch,  # type: ignore[arg-type]
            stop_last_trials=False,
            grace_period=space.scheduler.grace_epochs,  # type: ignore[arg-type]
            reduction_factor=space.scheduler.reduction,
        )
    return tune.Tuner(
        trainable,
        param_space={"values": values},
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            num_samples=space.num_trials if space.search == "optuna" else 1,
            search_alg=_optuna(shared) if space.search == "optuna" else None,
            scheduler=scheduler,
            time_budget_s=budget_s,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(shared.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=arguments.max_failures),
            callbacks=[Progress(space.num_trials, shared.folder, space.metric)],
        ),
    )


def _tune_domain(dimension: Choice | Uniform) -> Any:
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)


def _optuna(shared: Sweep) -> Searcher:
    from ray.tune.search.optuna import OptunaSearch

    space = shared.space
    search = OptunaSearch(metric=space.metric, mode=space.mode, seed=shared.arguments.config.loop.seed)
    return ConcurrencyLimiter(search, max_concurrent=shared.arguments.max_concurrent)


def conclude(run: Run, shared: Sweep, start: float, links: dict[str, str]) -> int:
    """Close the books: rank the trials, keep tables and pictures, say what is best."""
    space, folder, parent = shared.space, shared.folder, shared.run
    metric = space.final_metric
    # Not what fit() returns: that forgets the values of trials that never reported.
    trials = tune.ExperimentAnalysis(str(folder / TUNE_FOLDER)).trials
    ended = rank([result_of(shared, trial) for trial in trials], metric, space.mode)
    failed = [result for result in ended if result.status == "failed"]
    rows = rows_of(ended)
    write_csv(rows, folder / "results.csv")
    draw_curves(ended, {result.trial: curve(shared, result) for result in ended}, space.metric, folder / "curves.png")
    files = [folder / "results.csv", folder / "curves.png"]
    if space.search == "grid" and len(space.vary) == 2:
        draw_heat_map(ended, metric, folder / "heat_map.png")
        files.append(folder / "heat_map.png")
    links |= {file.stem.replace("_", " "): parent.file_link(file.name) for file in files if file.suffix == ".png"}
    winner = ended[0] if ended[0].status == "finished" else None
    tags, numbers = {}, {}
    if winner is not None:
        config = set_fields(shared.arguments.config, dict(winner.values))
        (folder / "best_config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")
        files.append(folder / "best_config.json")
        numbers = dict(winner.metrics)
        tags = {"best.trial": winner.trial, "best.run_id": winner.run_id}
        tags |= {f"best.{name.rpartition('.')[2]}": str(value) for name, value in winner.values.items()}
        link = folder / "best"  # makes the sweep's folder one that evaluate.py, predict.py and export.py take
        link.unlink(missing_ok=True)
        weights = weights_of(trial_folder(folder, winner.trial))
        link.symlink_to(weights.relative_to(folder), target_is_directory=True)
    for file in files:
        log_file(parent, file)
    for place, result in enumerate(ended, start=1):
        if result.status == "finished":
            tag_run(parent.uri, result.run_id, "rank", str(place))
    tags[NOTE_TAG] = write_note(ended, metric, parent, links)
    complete = winner is not None and not failed
    if complete:  # once: MLflow adds rows to a table that is there
        log_table(parent, rows, "results")
    finish_run(parent, status="FINISHED" if complete else "FAILED", tags=tags, metrics=numbers)
    print_table(ended)
    print(f"{len(ended)} trials in {elapsed_since(start)}")
    if winner is not None:
        print(
            f"best        {label(winner.values)}: {metric} {winner.metrics[metric]:.4f}\nweights     {folder / 'best'}"
        )
    print(
        f"results     {', '.join(str(file) for file in files)}\nMLflow UI   {parent.ui_command}\n"
        f"            then Model training > {run.arguments.experiment} > {run.arguments.run_name or folder.name}"
    )
    if complete and (name := shared.arguments.register_model) is not None:
        version = register(shared, ended[0].run_id, name)
        links[f"model {name}, version {version}"] = model_link(name, version)
        tag_run(parent.uri, parent.run_id, NOTE_TAG, write_note(ended, metric, parent, links))
    if failed:
        print(f"{len(failed)} trials failed. The same command tries them again.")
    elif winner is None:
        print("No trial finished: give more --hours or other values, and another --output.")
    if not complete:
        return 1
    assert winner is not None
    run.folder.write(run.content | {"status": "finished", "checkpoint": str(folder / "best"), "metrics": numbers})
    return 0


def register(shared: Sweep, run_id: str, name: str) -> str:
    """Add the best weights of the winner's run to MLflow's registry.   Returns: the version."""
    classifier = load_classifier(shared.folder / "best", device="cpu", resize_share=None)
    preprocessing = classifier.metadata.preprocessing
    version = register_model(
        replace(shared.run, run_id=run_id),
        Predictor(classifier.model, mean=preprocessing.mean, std=preprocessing.std).eval(),
        eval_batch(shared.validation, range(2), preprocessing.image_size).numpy(),
        name,
        {"classes": shared.classes},
    )
    print(f"model       models:/{name}@best, version {version}")
    return version


def close_children(shared: Sweep) -> None:
    """Say in MLflow that the trials under way are interrupted."""
    for place in (shared.folder / "trials").glob("*/run.json"):
        content = json.loads(place.read_text())
        if content["status"] == "running":
            with contextlib.suppress(Exception):
                finish_run(RunRef(**content["mlflow"]), status="KILLED")


def _base(name: str, space: Space) -> Callable[[], FinetuneConfig | PretrainConfig]:
    """The space as the command line knows recipes: a function with a name and a docstring."""

    def base() -> FinetuneConfig | PretrainConfig:
        return base_config(space)

    base.__name__, base.__doc__ = name, space.about
    return base


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(
        argv,
        program="sweep.py",
        about=__doc__,
        recipes={name: _base(name, space) for name, space in SPACES.items()},
        arguments_type=Arguments,
        action=sweep,
        kind="space",
    )


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.sweep import main as _main

    sys.exit(_main())
