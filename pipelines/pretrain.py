"""Pretrain an encoder with MixMAE, SimMIM or MAE.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/pretrain.py RECIPE [--data PATH] [--output FOLDER] [--workers N] [any field of the recipe]

The same command again continues a run that was interrupted, and of one that is finished it only sends MLflow what it
lacks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from mixmae.data.prepare import open_for_training
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.pretraining import HELDOUT_IMAGES, PretrainJob, check_method
from mixmae.probing.online import summarise_probe
from pipelines.command import recipe_command
from pipelines.recipes import PRETRAIN_RECIPES
from pipelines.run import RunArguments, begin, with_workers


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line: where to read, where to write, on what to run."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    experiment: str = "mixmae-pretrain"
    """MLflow experiment."""


def pretrain(arguments: Arguments, recipe: str) -> int:
    """Run or continue a pretraining run.   Returns: the process's exit status."""
    arguments, config = with_workers(arguments), arguments.config
    check_method(config)
    run = begin(arguments, recipe)
    if run is None:
        return 0
    source, heldout = open_for_training(arguments.data, run.data_folder, HELDOUT_IMAGES)
    job = run.record_data(PretrainJob.of(config, source, heldout, data=arguments.data, folder=run.folder.path))
    run.join_cluster(job)
    job = run.track(job)
    print(run.headline(job))
    done = run.train(job)
    if done is None:
        return run.exit_status
    metrics = done.metrics
    heldout_loss = metrics.get("final/heldout_loss")
    print(
        f"Finished in {done.seconds:.0f} s: loss {metrics['final/loss']:.4f}, "
        f"held-out {'not measured' if heldout_loss is None else f'{heldout_loss:.4f}'}\n"
        f"checkpoint  {done.checkpoint}\n"
        f"panel       {run.folder.shown(run.folder.last_panel())}\n"
        f"{run.ui_line}"
    )
    run.print_broken()
    if "final/knn_top1" in metrics:
        print(summarise_probe(done.state.metrics))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(pretrain, Arguments, argv, program="pretrain.py", about=__doc__, recipes=PRETRAIN_RECIPES)


if __name__ == "__main__":
    sys.exit(main())
