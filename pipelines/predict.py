"""Classify images that have no labels: a table of predictions, and a picture of some of them.

    python pipelines/predict.py MODEL IMAGES [--output FOLDER]

MODEL is as in pipelines/evaluate.py; IMAGES is a folder of image files, or any other source (docs/data.md). Written are
predictions.csv and predictions.png.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from mixmae.data.blocks import eval_batch
from mixmae.data.images.decode import Uint8Array
from mixmae.data.sources import list_splits, open_source
from pipelines.console import fail
from pipelines.evaluate import load_classifier
from pipelines.stats import CELL_PX, SHEET_SIDE, draw_contact_sheet


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which model, which images."""

    model: tyro.conf.Positional[Path]
    """A finetuning run's folder or checkpoint, or a classifier in any known format."""
    images: tyro.conf.Positional[str]
    """A folder of image files, or another source of images."""
    output: Path | None = None
    """Folder for the table and the picture. Default: predictions/NAME, after the images."""
    batch_size: int = 64
    """Images that are looked at at once."""
    resize_share: float | None = None
    """Side of the images' central crop over that of the whole. Default: the run's; 0.875 for files."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""


def predict(arguments: Arguments) -> int:
    """Classify the images and write what came of it.   Returns: the process's exit status."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}: it must be at least 1.")
    classifier = load_classifier(arguments.model, device=arguments.device, resize_share=arguments.resize_share)
    sources = [open_source(arguments.images, split) for split in list_splits(arguments.images)]
    folder = arguments.output or Path("predictions") / Path(arguments.images).resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[int, tuple[Uint8Array, int]] = {}
    captions: list[str] = []
    shown_each = SHEET_SIDE**2 // len(sources)
    count = 0
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "probability", "top5"])
        for source in sources:
            probabilities = classifier.logits(source, arguments.batch_size)[0].softmax(dim=1)
            values, classes = probabilities.topk(min(5, classifier.num_classes), dim=1)
            names = [[classifier.name_of(label) for label in row] for row in classes.tolist()]
            for row, (shares, called) in enumerate(zip(values.tolist(), names, strict=True)):
                five = "; ".join(f"{name} {share:.4f}" for name, share in zip(called, shares, strict=True))
                writer.writerow([source.where(row), called[0], f"{shares[0]:.4f}", five])
            rows = np.unique(np.linspace(0, source.num_rows - 1, min(shown_each, source.num_rows)).astype(np.int64))
            seen = eval_batch(source, rows.tolist(), CELL_PX, resize_share=classifier.resize_share)
            for row, pixels in zip(rows.tolist(), seen.permute(0, 2, 3, 1).numpy(), strict=True):
                pictures[count + row] = (pixels, len(captions))
                captions.append(f"{values[row, 0]:.0%} {names[row][0]}")
            count += source.num_rows
    draw_contact_sheet(pictures, tuple(captions)).save(folder / "predictions.png")
    print(f"{folder}: predictions.csv ({count} images), predictions.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = tyro.cli(Arguments, args=argv, prog="predict.py", description=__doc__)
    try:
        return predict(arguments)
    except (ValueError, FileNotFoundError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
