"""Teach a pretrained encoder to find the class of every pixel, or train one from scratch.

Ray Data streams the images with their masks, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/segment.py RECIPE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers N] [any field]

PATH of --pretrained is as in pipelines/finetune.py; --data is a set with masks (docs/segmentation.md), the built-in
scenes without it. The same command again continues a run that was interrupted, and does nothing for one that is
finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from mixmae.jobs.config import SegmentConfig
from mixmae.jobs.segmentation import CLASSES_FILE, SegmentationJob
from pipelines import finetune
from pipelines.command import recipe_command
from pipelines.finetune import prepare, track
from pipelines.recipes import SEGMENT_RECIPES


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line: from which weights, where to read, where to write, on what to run."""

    config: Annotated[SegmentConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]
    """The recipe's fields; any of them can be changed."""
    data: str | None = None
    """Images with masks: a folder as ADE20K, Cityscapes or Pascal VOC unpack, or with images/ beside masks/, which is
    packed once into shards beside the output; or such shards. Without it: the built-in scenes."""
    experiment: str = "mixmae-segment"
    """MLflow experiment."""


def segment(arguments: Arguments, recipe: str) -> int:
    """Run or continue a segmentation run.   Returns: the process's exit status."""
    prepared = prepare(arguments, recipe, SEGMENT_RECIPES[recipe](), SegmentationJob)
    if prepared is None:
        return 0
    run, job = prepared
    run.join_cluster(job)
    job = track(run, job)
    print(
        f"{run.headline(job)}\n"
        f"{job.num_classes} classes of pixels, validation on {job.validation.num_rows} images of {job.validation.name}"
    )
    done = run.train(job)
    if done is None:
        return run.exit_status
    metrics = done.metrics
    print(
        f"Finished in {done.seconds:.0f} s: mIoU {metrics['final/miou']:.2%}, "
        f"mean accuracy {metrics['final/macc']:.2%}, pixel accuracy {metrics['final/aacc']:.2%} (validation)\n"
        f"best        {run.folder.best}  mIoU {metrics['best/miou']:.2%} at step {metrics['best/step']:.0f}\n"
        f"classes     {run.folder.path / CLASSES_FILE}\n"
        f"pictures    {run.folder.last_panel()}\n"
        f"checkpoint  {done.checkpoint}\n"
        f"{run.ui_line}"
    )
    run.print_broken()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(segment, Arguments, argv, program="segment.py", about=__doc__, recipes=SEGMENT_RECIPES)


if __name__ == "__main__":
    sys.exit(main())
