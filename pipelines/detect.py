"""Teach a pretrained encoder to find objects, their boxes, classes and masks, or train one from scratch.

Ray Data streams the images with their objects, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/detect.py RECIPE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers N] [any field]

PATH of --pretrained is as in pipelines/finetune.py; --data is a set with objects (docs/detection.md), the built-in
scenes without it. The same command again continues a run that was interrupted, and does nothing for one that is
finished.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro

from mixmae.jobs.config import DetectConfig
from mixmae.jobs.detection import CLASSES_FILE, PREDICTIONS_FILE, DetectionJob
from pipelines import finetune
from pipelines.command import recipe_command
from pipelines.finetune import prepare, track
from pipelines.recipes import DETECT_RECIPES


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line: from which weights, where to read, where to write, on what to run."""

    config: Annotated[DetectConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]
    """The recipe's fields; any of them can be changed."""
    data: str | None = None
    """Images with objects: shards that make_shards made, or a folder of images with the annotations of COCO, Pascal
    VOC, YOLO or LabelMe, which is packed once into shards beside the output. Without it: the built-in scenes."""
    experiment: str = "mixmae-detect"
    """MLflow experiment."""


def detect(arguments: Arguments, recipe: str) -> int:
    """Run or continue a detection run.   Returns: the process's exit status."""
    prepared = prepare(arguments, recipe, DETECT_RECIPES[recipe](), DetectionJob)
    if prepared is None:
        return 0
    run, job = prepared
    run.join_cluster(job)
    job = track(run, job)
    judged = f"{job.validation.num_rows} images of {job.validation.name}"
    print(f"{run.headline(job)}\n{job.num_classes} classes of objects, validation on {judged}\n{job.sizes_line}")
    done = run.train(job)
    if done is None:
        return run.exit_status
    metrics = done.metrics
    print(
        f"Finished in {done.seconds:.0f} s: {in_words(metrics)} (validation)\n"
        f"best         {run.folder.best}  AP of boxes {metrics['best/box_ap']:.2%} at step {metrics['best/step']:.0f}\n"
        f"classes      {run.folder.path / CLASSES_FILE}\n"
        f"predictions  {run.folder.path / PREDICTIONS_FILE}\n"
        f"pictures     {run.folder.last_panel()}\n"
        f"checkpoint   {done.checkpoint}\n"
        f"{run.ui_line}"
    )
    run.print_broken()
    return 0


def in_words(metrics: Mapping[str, float]) -> str:
    """The figures of the last evaluation, those of masks where the model has some."""
    kinds = [kind for kind in ("box", "mask") if f"final/{kind}_ap" in metrics]
    plurals = {"box": "boxes", "mask": "masks"}
    return ", ".join(
        f"AP of {plurals[kind]} {metrics[f'final/{kind}_ap']:.2%} and AP50 {metrics[f'final/{kind}_ap50']:.2%}"
        for kind in kinds
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(detect, Arguments, argv, program="detect.py", about=__doc__, recipes=DETECT_RECIPES)


if __name__ == "__main__":
    sys.exit(main())
