"""Classify images that have no labels: a table of predictions, and a picture of some of them.

    python pipelines/predict.py MODEL IMAGES [--output FOLDER]

MODEL is as in pipelines/evaluate.py; IMAGES is a folder of image files, or any other source (docs/data.md). The output
folder gets predictions.csv and predictions.png. An image that does not decode gets no class: its row in the table says
why, in the column `problem`.

A run of pipelines/segment.py finds the class of every pixel instead: masks/ gets a PNG of class indices for each image,
overlays/ a picture of it. A run of pipelines/detect.py finds objects: predictions.json as COCO writes it, with
images.json for the numbers of images and categories, predictions.csv, and overlays/ with boxes and masks.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from mixmae.data.account import escaped
from mixmae.data.blocks import BrokenRecord, eval_batch
from mixmae.data.broken import NothingDecodes, name_broken
from mixmae.data.channels import check_channels
from mixmae.data.images.decode import Uint8Array
from mixmae.data.source import Source
from mixmae.data.sources import list_splits, open_source
from mixmae.inference import Classifier, Judged, load_classifier
from mixmae.jobs.detecting import is_detection, load_finder
from mixmae.jobs.segmenter import is_segmentation, load_segmenter
from mixmae.machine import Device
from mixmae.writing import writing
from pipelines.command import command
from pipelines.detected import predict_detection
from pipelines.segmented import predict_segmentation
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
    """Images per batch."""
    crop_pct: float | None = None
    """Side of the images' central crop over that of the resized image. Default: the run's; 0.875 for files."""
    weights_key: str | None = None
    """Which weights, of a file with several sets, such as model_ema or teacher. Default: the trained ones."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU if there is one."""


def predict(arguments: Arguments) -> int:
    """Classify the images and write the table and the picture.   Returns: the process's exit status."""
    folder = arguments.output or Path("predictions") / escaped(Path(arguments.images).resolve().name)
    if is_detection(arguments.model):
        return predict_detection(load_finder(arguments.model, device=arguments.device), arguments.images, folder)
    if is_segmentation(arguments.model):
        segmenter = load_segmenter(arguments.model, device=arguments.device)
        return predict_segmentation(segmenter, arguments.images, folder)
    classifier = load_classifier(
        arguments.model,
        device=arguments.device,
        crop_pct=arguments.crop_pct,
        batch_size=arguments.batch_size,
        key=arguments.weights_key,
    )
    sources = [open_source(arguments.images, split) for split in list_splits(arguments.images)]
    for source in sources:
        check_channels(source, classifier.metadata.encoder.in_channels)
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[int, tuple[Uint8Array, int]] = {}
    captions: list[str] = []
    shown_per_source = SHEET_SIDE**2 // len(sources)
    broken: list[BrokenRecord] = []
    count = 0
    with (
        writing(folder / "predictions.csv") as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "class", "probability", "top5", "problem"])
        for source in sources:
            judged = judge(classifier, source)
            values, classes = judged.values.softmax(dim=1).topk(min(5, classifier.num_classes), dim=1)
            names = [[classifier.name_of(label) for label in row] for row in classes.tolist()]
            predictions = zip(judged.rows.tolist(), values.tolist(), names, strict=True)
            lines = {record.row: ["", "", "", record.reason] for record in judged.broken}
            for row, shares, called in predictions:
                five = "; ".join(f"{name} {share:.4f}" for name, share in zip(called, shares, strict=True))
                lines[row] = [called[0], f"{shares[0]:.4f}", five, ""]
            writer.writerows([source.where(row), *lines[row]] for row in range(source.num_rows))
            chosen = np.unique(np.linspace(0, len(values) - 1, min(shown_per_source, len(values))).astype(np.int64))
            rows = judged.rows[chosen].tolist()
            cells = eval_batch(source, rows, CELL_PX, crop_pct=classifier.crop_pct) if rows else torch.empty(0)
            for index, row, pixels in zip(chosen.tolist(), rows, cells, strict=True):
                shown[count + row] = (pixels.permute(1, 2, 0).numpy(), len(captions))
                captions.append(f"{values[index, 0]:.0%} {names[index][0]}")
            broken.extend(judged.broken)
            count += source.num_rows
        if len(broken) == count:
            raise NothingDecodes(sources[0], broken)
    draw_contact_sheet(shown, tuple(captions)).save(folder / "predictions.png")
    print(f"{folder}: predictions.csv ({count} images), predictions.png")
    if broken:
        print(f"no class: {name_broken(broken, count)}")
    return 0


def judge(classifier: Classifier, source: Source) -> Judged:
    """The logits of a source's images, of none if all are broken: another split may have whole ones."""
    try:
        return classifier.logits(source)
    except NothingDecodes as error:
        nothing = torch.empty(0, dtype=torch.int64)
        return Judged(torch.empty(0, classifier.num_classes), nothing, nothing, error.records)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(predict, Arguments, argv, program="predict.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
