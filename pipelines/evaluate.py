"""Judge a finetuned model on labelled images: accuracy, a table of classes, confusions, calibration, speed.

    python pipelines/evaluate.py MODEL [--data SOURCE] [--split SPLIT] [--output FOLDER]

MODEL is a finetuning run's folder (its best weights), one of its checkpoints, a classifier file, a hub folder, or
official finetuned weights. The output folder gets metrics.json, classes.csv, confusions.png and calibration.png. Images
that do not decode are named and left out.

A run of pipelines/segment.py is judged on images with masks: mIoU and its relatives in metrics.json, classes.csv, and
the images that it does worst on in worst.png. A run of pipelines/detect.py is judged on images with objects: COCO's AP
in metrics.json, classes.csv, confusion.csv, predictions.json, worst.png. With --predictions FILE, detections that
somebody else made, as COCO writes them, are judged in place of the run's own, on the run's validation images or --data.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import Tensor
from torch.nn import functional as F

from mixmae.convert.metadata import NOT_STATED
from mixmae.data.broken import name_broken
from mixmae.data.channels import check_channels
from mixmae.data.prepare import open_for_training
from mixmae.data.shards.plan import built_in
from mixmae.data.source import DataError, Source
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.storage import plain_place
from mixmae.inference import Classifier, load_classifier
from mixmae.jobs.detecting import is_detection, load_finder
from mixmae.jobs.segmenter import is_segmentation, load_segmenter
from mixmae.jobs.supervised import HELDOUT_IMAGES
from mixmae.machine import Device
from mixmae.metrics import UNKNOWN, Calibration, calibration, confusion_matrix, per_class_accuracy, top_k_accuracy
from mixmae.training.run_folder import run_around, stem_of, weights_of
from mixmae.writing import write_json, writing
from pipelines.command import command
from pipelines.detected import evaluate_detection, evaluate_predictions
from pipelines.segmented import evaluate_segmentation

SHOWN_CLASSES = 60
"""Most classes whose names fit beside the picture of the confusion matrix."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: what to judge, and on what."""

    model: tyro.conf.Positional[Path | None] = None
    """A finetuning run's folder or checkpoint, or a classifier in any known format. Not needed with --predictions and
    --data."""
    weights_key: str | None = None
    """Which weights, of a file with several sets, such as model_ema or teacher. Default: the trained ones."""
    data: str | None = None
    """Labelled images (docs/data.md). Without it: the images that the run itself held out."""
    split: Literal["train", "validation", "test"] | None = None
    """Split to judge on. Default: the images that the run held out of this data; for other data validation, else test,
    else train."""
    predictions: Path | None = None
    """Judge these detections, a JSON list as COCO writes it, with the data's own numbers of images and categories."""
    output: Path | None = None
    """Folder for the tables and pictures. Default: evaluations/NAME, after the run or the file."""
    batch_size: int = 64
    """Images per batch."""
    crop_pct: float | None = None
    """Side of the images' central crop over that of the resized image. Default: the run's; 0.875 for files."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU if there is one."""


def evaluate(arguments: Arguments) -> int:
    """Judge the model and write the results.   Returns: the process's exit status."""
    if arguments.predictions is not None:
        return evaluate_predictions(arguments.predictions, _open(arguments), output_folder(arguments))
    if arguments.model is None:
        raise ValueError("say what to judge: a model, or detections with --predictions FILE.")
    if is_detection(arguments.model):
        finder = load_finder(arguments.model, device=arguments.device)
        return evaluate_detection(finder, _open(arguments), arguments.model, output_folder(arguments))
    if is_segmentation(arguments.model):
        segmenter = load_segmenter(arguments.model, device=arguments.device)
        folder = output_folder(arguments)
        return evaluate_segmentation(segmenter, _open(arguments), arguments.model, folder)
    classifier = load_classifier(
        arguments.model,
        device=arguments.device,
        crop_pct=arguments.crop_pct,
        batch_size=arguments.batch_size,
        key=arguments.weights_key,
    )
    source = open_labelled(arguments, classifier)
    folder = output_folder(arguments)
    start = time.monotonic()
    logits, labels, _, broken = classifier.logits(source)
    images_per_s = len(labels) / (time.monotonic() - start)
    metrics = write_results(folder, classifier, logits, labels)
    origin = classifier.metadata.source
    content = {
        "model": str(weights_of(arguments.model)),
        "run_id": origin.get("run_id", NOT_STATED),
        "data": {"name": source.name, "digest": source.digest},
        "crop_pct": classifier.crop_pct,
        **metrics,
        "num_broken": len(broken),
        "images_per_s": images_per_s,
    }
    write_json(folder / "metrics.json", content)
    print(
        f"{weights_of(arguments.model)} on {source.name}: top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, "
        f"loss {metrics['loss']:.4f}, calibration error {metrics['calibration_error']:.4f}\n"
        f"{metrics['num_judged']} images judged, {metrics['num_unknown']} without a class; "
        f"{images_per_s:.0f} images/s on {classifier.device.type}\n"
        f"{folder}: metrics.json, classes.csv, confusions.png, calibration.png"
    )
    if broken:
        print(f"left out: {name_broken(broken, source.num_rows)}")
    return 0


def output_folder(arguments: Arguments) -> Path:
    """The folder for tables and pictures, which is made."""
    judged = arguments.model or arguments.predictions
    assert judged is not None
    run = run_around(judged)
    folder = arguments.output or Path("evaluations") / (run.name if run else stem_of(judged))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_labelled(arguments: Arguments, classifier: Classifier) -> Source:
    """The images to judge on.   Raises: DataError if they have no classes, or other ones than the model, or colours."""
    source = _open(arguments)
    check_channels(source, classifier.metadata.encoder.in_channels)
    labels = source.read_labels()
    if not (labels >= 0).any():
        raise DataError(f"{source.name} has no labels to judge by: give labelled images, or use pipelines/predict.py.")
    if labels.max() >= classifier.num_classes:
        raise DataError(
            f"{source.name} has the label {labels.max()}, but the model knows {classifier.num_classes} classes: judge "
            "it on the classes that it was finetuned for."
        )
    if source.class_names and classifier.class_names and tuple(source.class_names) != classifier.class_names:
        pairs = zip(source.class_names, classifier.class_names, strict=False)
        theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), ("fewer classes", "more"))
        raise DataError(
            f"{source.name} has other classes than the model ({theirs} where it has {ours}; {len(source.class_names)} "
            f"and {len(classifier.class_names)} in all): evaluate it on the classes that it was finetuned for."
        )
    return source


def _open(arguments: Arguments) -> Source:
    run = run_around(arguments.model) if arguments.model else None
    if run is not None and arguments.split is None:
        trained_on = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["source"]
        if trained_on == "built-in":  # an earlier version's name of it
            trained_on = "shapes"
        data = arguments.data or trained_on
        if data == trained_on or plain_place(data) == trained_on or built_in(data):
            return open_for_training(data, run.parent / "data", HELDOUT_IMAGES)[1]
    if arguments.data is None:
        raise ValueError("say on which images: --data SOURCE (it may be left out for a run, and without --split).")
    there = list_splits(arguments.data)
    return open_source(
        arguments.data, arguments.split or next(name for name in ("validation", "test", "train") if name in there)
    )


def write_results(folder: Path, classifier: Classifier, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Write the tables and pictures.   Returns: the numbers."""
    accuracy, measured = top_k_accuracy(logits, labels), calibration(logits, labels)
    table, confusions = per_class_accuracy(logits, labels), confusion_matrix(logits, labels)
    known = labels != UNKNOWN
    with (
        writing(folder / "classes.csv") as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["class", "name", "images", "top1", "top5", "most_taken_for"])
        for label in range(classifier.num_classes):
            wrong = confusions[label].clone()
            wrong[label] = 0
            taken_for = classifier.name_of(int(wrong.argmax())) if wrong.sum() else ""
            shares = [f"{value:.4f}" if table.counts[label] else "" for value in (table.top1[label], table.top5[label])]
            writer.writerow([label, classifier.name_of(label), int(table.counts[label]), *shares, taken_for])
    draw_confusions(confusions, classifier, folder / "confusions.png")
    draw_calibration(measured, folder / "calibration.png")
    return {
        "top1": accuracy.top[1],
        "top5": accuracy.top[5],
        "loss": F.cross_entropy(logits[known].double(), labels[known]).item(),
        "mean_class_top1": table.top1[table.counts > 0].mean().item(),
        "calibration_error": measured.expected_error,
        "num_judged": accuracy.num_judged,
        "num_unknown": accuracy.num_unknown,
    }


def draw_confusions(confusions: Tensor, classifier: Classifier, path: Path) -> None:
    """A picture of the confusion matrix, each row as shares of its class."""
    from matplotlib.figure import Figure

    num_classes = len(confusions)
    side = min(12.0, 4.0 + 0.16 * num_classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="class")
    shares = confusions / confusions.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if num_classes <= SHOWN_CLASSES:
        names = [classifier.name_of(label) for label in range(num_classes)]
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=8)
        axes.set_yticks(range(num_classes), names, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class's images")
    figure.savefig(path, dpi=120)


def draw_calibration(measured: Calibration, path: Path) -> None:
    """A reliability diagram: how often predictions of each confidence are right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    widths = measured.edges.diff()
    accuracy = [0.0 if math.isnan(value) else value for value in measured.accuracy.tolist()]
    axes.bar(measured.edges[:-1].tolist(), accuracy, width=widths.tolist(), align="edge", edgecolor="white")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axes.set_title(f"expected calibration error {measured.expected_error:.4f}", fontsize=10)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(evaluate, Arguments, argv, program="evaluate.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
