"""Finetune a pretrained encoder to classify images, or train one from scratch.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/finetune.py RECIPE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers N] [any field]

PATH of --pretrained is a run's folder or one of its checkpoints, an encoder file, a hub folder, or weights of any other
format in docs/weights.md. The same command again continues a run that was interrupted, and does nothing for one that is
finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mixmae.data.prepare import open_for_training
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.config import FinetuneConfig, SupervisedConfig
from mixmae.jobs.pretrained import keep_initial, read_pretrained
from mixmae.jobs.record import read_begun
from mixmae.jobs.supervised import HELDOUT_IMAGES, SupervisedJob
from pipelines.command import recipe_command
from pipelines.recipes import FINETUNE_RECIPES
from pipelines.run import Run, RunArguments, begin, output_folder, with_workers

JobT = TypeVar("JobT", bound=SupervisedJob)


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line: from which weights, where to read, where to write, on what to run."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    pretrained: Path | None = None
    """Weights to start from: a run's folder or checkpoint, an encoder file, a hub folder, official files. Their
    architecture takes the recipe's place, unless fields of the encoder are given. Without it: from scratch."""
    weights_key: str | None = None
    """Which weights of --pretrained, if its file has several sets, such as model_ema or teacher. Default: the trained
    ones."""
    experiment: str = "mixmae-finetune"
    """MLflow experiment."""


def finetune(arguments: Arguments, recipe: str) -> int:
    """Run or continue a finetuning run.   Returns: the process's exit status."""
    prepared = prepare(arguments, recipe, FINETUNE_RECIPES[recipe](), ClassificationJob)
    return 0 if prepared is None else train_classifier(*prepared)


def prepare(
    arguments: Arguments, recipe: str, usual: SupervisedConfig, job_type: type[JobT], *, cached: bool = False
) -> tuple[Run, JobT] | None:
    """Read the weights, take the folder, look at the data: what a user got wrong is found here, before the run starts.

    Args: usual: the recipe's config.  cached: whether it is a linear probe on cached features.
    Returns: the run and its job, or None if the run is finished, which is printed.
    """
    arguments = replace(arguments, workers=1) if cached else with_workers(arguments)
    config: SupervisedConfig = arguments.config
    pretrained, weights = None, None
    if arguments.pretrained is not None:
        before = read_begun(output_folder(arguments, recipe))
        pretrained, weights, config = read_pretrained(
            arguments.pretrained, config, usual, before, arguments.weights_key
        )
    elif arguments.weights_key is not None:
        raise ValueError("--weights-key is for the weights of --pretrained: give both, or neither.")
    config.check_size()
    arguments = replace(arguments, config=config)  # type: ignore[arg-type]  # of the same kind as it was
    run = begin(arguments, recipe, pretrained=pretrained, cached=cached)
    if run is None:
        return None
    data, folder = arguments.data or job_type.default_data, run.folder.path
    source, validation = open_for_training(data, run.data_folder, HELDOUT_IMAGES)
    job = run.record_data(job_type.of(config, source, validation, data=data, folder=folder, pretrained=pretrained))
    if pretrained is None:
        print("note: no --pretrained weights: starting from random ones")
    elif weights is not None:
        keep_initial(pretrained, weights, config, folder)
    return run, job


def track(run: Run, job: JobT) -> JobT:
    """Open the MLflow run; it and the pretraining run point at each other where both are in one store."""
    origin = None
    if job.pretrained and job.pretrained.run_id:
        mark = "finetuned" if job.stage == "finetune" else job.stage
        origin = {"run_id": job.pretrained.run_id, "mark": mark}
    return run.track(job, origin=origin)


def train_classifier(run: Run, job: ClassificationJob) -> int:
    """Train on Ray's workers and print what came of it.   Returns: the process's exit status."""
    run.join_cluster(job)
    job = track(run, job)
    print(
        f"{run.headline(job)}\n"
        f"{job.num_classes} classes, validation on {job.validation.num_rows} images of {job.validation.name}"
    )
    done = run.train(job)
    if done is None:
        return run.exit_status
    metrics, best = done.metrics, run.folder.shown(run.folder.best)
    print(
        f"Finished in {done.seconds:.0f} s: top-1 {metrics['final/top1']:.2%}, top-5 {metrics['final/top5']:.2%}, "
        f"loss {metrics['final/loss']:.4f} (validation)\n"
        f"best        {best}  top-1 {metrics['best/top1']:.2%} at step {metrics['best/step']:.0f}\n"
        f"checkpoint  {done.checkpoint}\n"
        f"{run.ui_line}"
    )
    run.print_broken()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(finetune, Arguments, argv, program="finetune.py", about=__doc__, recipes=FINETUNE_RECIPES)


if __name__ == "__main__":
    sys.exit(main())
