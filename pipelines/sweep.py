"""Try many settings of a finetuning, or of a pretraining, and rank them.

Ray Tune chooses the trials, each of which is a run of its own on Ray Train; MLflow keeps one parent run per sweep and a
child run per trial. Trials of pretraining start from nothing and are judged by their probe on labelled images.

    python pipelines/sweep.py SPACE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers-per-trial N]
        [--max-concurrent N] [--trials N] [--hours H] [any field of the space's recipe]

The same command again continues a sweep that was interrupted: no finished trial runs again, one that was under way
continues from its checkpoint, and one whose workers failed is tried once more.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mixmae.data.prepare import open_for_training
from mixmae.data.source import DataError
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.config import DetectConfig, PretrainConfig, SegmentConfig, SupervisedConfig
from mixmae.jobs.detection import DetectionJob
from mixmae.jobs.pretrained import keep_initial, read_pretrained
from mixmae.jobs.pretraining import HELDOUT_IMAGES as PRETRAIN_HELDOUT_IMAGES
from mixmae.jobs.pretraining import PretrainJob, check_method
from mixmae.jobs.record import RunRecord, read_begun
from mixmae.jobs.segmentation import SegmentationJob
from mixmae.jobs.supervised import HELDOUT_IMAGES, SupervisedJob
from mixmae.stores import refuse_store
from mixmae.tracking import claim_model_name, finish_run
from mixmae.training.cluster import default_workers
from pipelines.command import recipe_command
from pipelines.recipes import DETECT_RECIPES, FINETUNE_RECIPES, PRETRAIN_RECIPES, SEGMENT_RECIPES
from pipelines.run import Run, begin, output_folder, with_workers
from pipelines.sweeping.parent import close_children, conclude, open_parent
from pipelines.sweeping.trial import Arguments, Sweep
from pipelines.sweeping.tuner import join_cluster, make_tuner
from tune_spaces import SPACES
from tune_spaces.fields import get_field, set_fields
from tune_spaces.space import Space

SUPERVISED_RECIPES: dict[str, Callable[[], Any]] = {**FINETUNE_RECIPES, **SEGMENT_RECIPES, **DETECT_RECIPES}


def sweep(arguments: Arguments, name: str) -> int:
    """Run or continue a sweep.   Returns: the process's exit status."""
    space = choose_space(arguments, name)
    refuse_store(arguments.output, "a sweep")
    output = output_folder(arguments, f"sweep_{name}")  # the folder has the sweep's name, not the recipe's
    config, pretrained, weights = arguments.config, None, None
    if isinstance(config, SupervisedConfig) and arguments.pretrained is not None:
        usual = SUPERVISED_RECIPES[space.recipe]()
        begun = read_begun(output)
        pretrained, weights, config = read_pretrained(arguments.pretrained, config, usual, begun, arguments.weights_key)
    elif arguments.weights_key is not None:
        raise ValueError("--weights-key is for the weights of --pretrained: give both, or neither.")
    arguments = with_workers(replace(arguments, output=output.path, config=config))
    check_trials(space, config, arguments.workers)
    if not arguments.max_concurrent:
        at_once = default_workers(arguments.ray_address, arguments.device) // arguments.workers
        arguments = replace(arguments, max_concurrent=max(1, min(at_once, space.num_trials)))
    reference = choose_reference(arguments, space, read_begun(output))
    run = begin(arguments, name, pretrained=pretrained, space=fixed_for_all(space, config, reference))
    if run is None:
        return 0
    if arguments.register_model is not None:
        kind = "segmenter" if isinstance(config, SegmentConfig) else "classifier"
        claim_model_name(run.uri, arguments.register_model, kind)
    job = make_job(run)
    if isinstance(config, SupervisedConfig):
        if pretrained is None:
            print("note: no --pretrained weights: every trial trains from scratch")
        elif weights is not None:
            keep_initial(pretrained, weights, config, output.path)
    use_gpu, slots = join_cluster(arguments, space)
    parent, links = open_parent(run, space, job)
    doing = "Continuing" if run.is_continued else "Sweeping"
    beside = "" if reference is None else " and a reference from scratch"
    print(
        f"{doing} {name}: {space.num_trials} trials{beside} of {space.recipe} on {job.source.name} "
        f"({job.source.num_rows} images), {job.length.total_steps} steps each unless it varies, "
        f"{arguments.max_concurrent} at once\noutput {output.path}\nMLflow {run.uri}",
        flush=True,
    )
    shared = Sweep(
        arguments=arguments,
        space=space,
        job=job,
        folder=output.path,
        pretrained=pretrained,
        reference=reference,
        run=parent,
        use_gpu=use_gpu,
        hold=run.hold,
    )
    start = time.monotonic()
    try:
        make_tuner(shared, slots).fit()
    except KeyboardInterrupt:
        close_children(output.path)
        with contextlib.suppress(Exception):  # MLflow may be away; the same command sets it running again
            finish_run(parent, status="KILLED")
        print("\nInterrupted. The same command continues.", flush=True)
        return 130
    return conclude(run, shared, start, links)


def make_job(run: Run) -> SupervisedJob | PretrainJob:
    """The job that those of the trials are made of.   Raises: DataError for images that cannot judge the trials."""
    config, data, folder = run.arguments.config, run.arguments.data, run.folder.path
    if isinstance(config, SupervisedConfig):
        kinds: dict[type, type[SupervisedJob]] = {SegmentConfig: SegmentationJob, DetectConfig: DetectionJob}
        kind = kinds.get(type(config), ClassificationJob)
        data, pretrained = data or kind.default_data, run.record.pretrained
        source, validation = open_for_training(data, run.data_folder, HELDOUT_IMAGES)
        return run.record_data(kind.of(config, source, validation, data=data, folder=folder, pretrained=pretrained))
    assert isinstance(config, PretrainConfig)
    source, heldout = open_for_training(data, run.data_folder, PRETRAIN_HELDOUT_IMAGES)
    job = PretrainJob.of(config, source, heldout, data=data, folder=folder)
    if job.probe is None:
        raise DataError(
            f"the trials cannot be judged on {source.name}, see the note: give a set with labels (docs/data.md)."
        )
    return run.record_data(job)


def choose_reference(arguments: Arguments, space: Space, before: RunRecord | None) -> Mapping[str, Any] | None:
    """The fields of the reference from scratch, or None for a sweep without one.

    A sweep that was begun without it, as all of earlier versions were, goes on without it.

    Args: before: the interrupted sweep that is continued, if there is one.
    """
    begun_without = before is not None and before.space is not None and "reference" not in before.space
    return space.reference if arguments.reference and arguments.pretrained and not begun_without else None


def fixed_for_all(
    space: Space, config: SupervisedConfig | PretrainConfig, reference: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a continued sweep must have as it was: the space, the probe of pretraining, the reference of finetuning.

    Args: reference: its fields; None: there is none.
    """
    return {
        **space.to_json(),
        **({"probe": vars(config.probe)} if isinstance(config, PretrainConfig) else {}),
        **({} if reference is None else {"reference": dict(reference)}),
    }


def choose_space(arguments: Arguments, name: str) -> Space:
    """The space with the budget of the command line.   Raises: ValueError for what cannot be swept like this."""
    space = SPACES[name]
    if arguments.trials is not None:
        space = replace(space, trials=arguments.trials)
    if arguments.hours is not None:
        space = replace(space, hours=arguments.hours)
    if arguments.max_concurrent < 0:
        raise ValueError(f"--max-concurrent is {arguments.max_concurrent}: it must be at least 1, or 0 to choose.")
    usual = base_config(space)
    pretrains = isinstance(usual, PretrainConfig)
    if pretrains != space.pretrains:
        raise ValueError(
            f"the space ranks by {space.metric}, which {space.recipe} does not have: pretraining has probe/knn_top1 "
            "and probe/linear_top1, finetuning val/top1, val/top5 and val/loss, segmentation val/miou and val/loss, "
            "detection val/box_ap and val/mask_ap."
        )
    if pretrains and (arguments.pretrained or arguments.register_model):
        raise ValueError(
            f"the trials of {name} are pretraining, from nothing to an encoder: leave out --pretrained and "
            "--register-model."
        )
    if arguments.register_model and not space.registers:
        raise ValueError(
            f"the trials of {name} are detectors, whose output has no fixed shape, so that none can be registered: "
            "leave out --register-model; the sweep's link `best` leads to the best one's weights."
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


def check_trials(space: Space, config: SupervisedConfig | PretrainConfig, num_workers: int) -> None:
    """See that every trial can be trained like this.   Raises: ValueError."""
    space.check(config)
    reference = [] if space.pretrains else [space.reference]
    for point in [*reference, *space.points(config.loop.seed)]:
        trial = set_fields(config, point)
        trial.share(num_workers=num_workers)
        trial.check_size()
        if isinstance(trial, PretrainConfig):
            check_method(trial)


def base_config(space: Space) -> SupervisedConfig | PretrainConfig:
    """The config that all trials start from."""
    recipes: dict[str, Callable[[], Any]] = {**SUPERVISED_RECIPES, **PRETRAIN_RECIPES}
    if space.recipe not in recipes:
        near = difflib.get_close_matches(space.recipe, recipes, n=3, cutoff=0.4)
        raise ValueError(f"there is no recipe {space.recipe!r}: did you mean {' or '.join(near or recipes)}?")
    return set_fields(recipes[space.recipe](), space.change)


def _as_recipe(name: str, space: Space) -> Callable[[], SupervisedConfig | PretrainConfig]:
    """The space as the command line knows recipes: a function with a name and a docstring."""

    def base() -> SupervisedConfig | PretrainConfig:
        return base_config(space)

    base.__name__, base.__doc__ = name, space.about
    return base


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(
        sweep,
        Arguments,
        argv,
        program="sweep.py",
        about=__doc__,
        recipes={name: _as_recipe(name, space) for name, space in SPACES.items()},
        kind="space",
    )


if __name__ == "__main__":
    sys.exit(main())
