"""Classify images by their nearest neighbours among an encoder's features: how well they separate classes untrained.

    python pipelines/knn.py WEIGHTS [--data SOURCE] [--k 20] [--output FOLDER]

WEIGHTS is a run's folder or one of its checkpoints, an encoder file, a hub folder, or weights of any other format in
docs/weights.md. Each image of the training and of the validation split goes through the encoder once. The result is
written to knn.json and to an MLflow run, which points at the run that the weights are of.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from mixmae.data.broken import check_decoding
from mixmae.data.channels import check_channels
from mixmae.data.chunks import Int64Array
from mixmae.data.classes import read_classes
from mixmae.data.prepare import open_for_training
from mixmae.data.shards.plan import DEFAULT_SET
from mixmae.data.source import Source
from mixmae.data.sources.storage import writable_folder
from mixmae.inference import FrozenEncoder, load_frozen
from mixmae.jobs.supervised import HELDOUT_IMAGES
from mixmae.machine import Device
from mixmae.probing.knn import KnnConfig, KnnResult, knn_classify
from mixmae.tracking import RunRef, create_run, finish_run, resolve_uri, tag_run
from mixmae.training.loop import LoopConfig
from mixmae.training.run_folder import run_around, stem_of
from mixmae.writing import write_json
from pipelines.command import command


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which encoder, on which images, with how many neighbours."""

    weights: tyro.conf.Positional[Path]
    """A run's folder or checkpoint, an encoder file, a hub folder, or weights of other formats."""
    weights_key: str | None = None
    """Which weights, of a file with several sets, such as model_ema or teacher. Default: the trained ones."""
    data: str | None = None
    """Labelled images (docs/data.md), as for pretraining. Without it: the built-in moths."""
    k: int = 20
    """Training images that vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine / temperature)."""
    train_images: int | None = None
    """Most training images that are used, spread evenly over the set. Default: all."""
    output: Path | None = None
    """Folder for knn.json. Default: evaluations/NAME, after the run or the file."""
    batch_size: int = 64
    """Images per batch."""
    crop_pct: float | None = None
    """Side of the images' central crop over that of the resized image. Default: the file's, else 0.875."""
    device: Device = "auto"
    """Where the encoder runs; auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder; bfloat16 is about twice as fast on a GPU."""
    mlflow_uri: str | None = None
    """Tracking server. Default: MLFLOW_TRACKING_URI, else mlflow.db beside the run, or in runs/."""
    experiment: str = "mixmae-knn"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the name of the run or the file."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is judged: an encoder by the classes of these images."""

    frozen: FrozenEncoder
    train: Source
    rows: Int64Array
    """Training images that are used."""
    validation: Source
    num_classes: int
    config: KnnConfig

    @property
    def num_images(self) -> int:
        """Images that go through the encoder."""
        return len(self.rows) + self.validation.num_rows

    def facts(self, arguments: Arguments) -> dict[str, Any]:
        """What knn.json and MLflow's parameters say of it."""
        return {
            "weights": str(self.frozen.path),
            "weights_digest": self.frozen.digest,
            "k": self.config.k,
            "temperature": self.config.temperature,
            "classes": self.num_classes,
            "train_images": len(self.rows),
            "validation_images": self.validation.num_rows,
            "image_size": list(self.frozen.preprocessing.image_size),
            "crop_pct": self.frozen.crop_pct,
            "precision": arguments.precision,
        }

    def classify(self) -> tuple[KnnResult, dict[str, int]]:
        """Extract the features of both sets and count the votes, on the encoder's device.

        Returns: the result, and the numbers of images that decode: train_images and validation_images.
        """
        features, labels, *_ = self.frozen.features(self.train, self.rows)
        judged, classes, *_ = self.frozen.features(self.validation)
        result = knn_classify(
            features.to(self.frozen.device),
            labels,
            judged,
            classes,
            num_classes=self.num_classes,
            config=self.config,
        )
        return result, {"train_images": len(features), "validation_images": len(judged)}


def knn(arguments: Arguments) -> int:
    """Judge the encoder and write the result.   Returns: the process's exit status."""
    run = run_around(arguments.weights)
    base = run.parent if run else Path("runs")
    name = run.name if run else stem_of(arguments.weights)
    task = prepare(arguments, base / "data")
    folder = writable_folder(arguments.output or Path("evaluations") / name)
    train, validation, run_id = task.train, task.validation, task.frozen.run_id
    data = {"name": train.name, "digest": train.digest, "source": arguments.data or DEFAULT_SET}
    facts = task.facts(arguments)
    tags = {"stage": "knn", "pretrained": str(task.frozen.path)}
    ref = create_run(
        uri=resolve_uri(arguments.mlflow_uri, base),
        experiment=arguments.experiment,
        name=arguments.run_name or name,
        params=facts,
        tags=tags | ({"pretrained.run_id": run_id} if run_id else {}),
        dataset=data,
    )
    result, counts, metrics = classify(task, ref)
    if run_id:
        tag_run(ref.uri, run_id, f"knn.{ref.run_id}", f"top-1 {metrics['val/top1']:.4f}")
    content = {
        "run_id": ref.run_id,
        "pretrained_run_id": run_id,
        "data": {"train": data, "validation": {"name": validation.name, "digest": validation.digest}},
        **facts,
        **counts,
        "num_broken": task.num_images - sum(counts.values()),
        "top1": metrics["val/top1"],
        "top5": metrics["val/top5"],
        "num_judged": result.accuracy.num_judged,
        "images_per_s": metrics["perf/images_per_s"],
    }
    write_json(folder / "knn.json", content)
    print(
        f"kNN of {task.frozen.path} on {validation.name}: top-1 {content['top1']:.2%}, top-5 {content['top5']:.2%} "
        f"(k = {task.config.k}, chance level {1 / task.num_classes:.2%})\n"
        f"{counts['train_images']} training and {result.accuracy.num_judged} validation images, "
        f"{content['images_per_s']:.0f} images/s on {task.frozen.device.type}\n"
        f"{folder / 'knn.json'}\nMLflow UI   {ref.ui_command}"
    )
    return 0


def prepare(arguments: Arguments, data_folder: Path) -> Task:
    """Load the encoder and open the images.   Raises: ValueError if they cannot be judged so."""
    config = KnnConfig(k=arguments.k, temperature=arguments.temperature)
    frozen = load_frozen(
        arguments.weights,
        device=arguments.device,
        crop_pct=arguments.crop_pct,
        batch_size=arguments.batch_size,
        bfloat16=arguments.precision == "bfloat16",
        key=arguments.weights_key,
    )
    train, validation = open_for_training(arguments.data, data_folder, HELDOUT_IMAGES)
    for source in (train, validation):
        check_decoding(source, LoopConfig(max_broken_fraction=1).is_hopeless)
    check_channels(train, frozen.encoder.in_channels)
    classes = read_classes(train, validation)
    rows = choose_rows(train, arguments.train_images)
    check_voters(train.read_labels()[rows], validation.read_labels(), config.k)
    return Task(frozen=frozen, train=train, rows=rows, validation=validation, num_classes=len(classes), config=config)


def classify(task: Task, ref: RunRef) -> tuple[KnnResult, dict[str, int], dict[str, float]]:
    """Classify, and end the MLflow run.   Returns: as Task.classify, and the metrics that MLflow has of it."""
    status: str = "FAILED"
    metrics: dict[str, float] = {}
    try:
        start = time.monotonic()
        result, counts = task.classify()
        metrics = {
            "val/top1": result.accuracy.top[1],
            "val/top5": result.accuracy.top[5],
            "perf/images_per_s": task.num_images / (time.monotonic() - start),
        }
        status = "FINISHED"
    finally:
        with contextlib.suppress(Exception):  # trouble with the store must not hide the result
            finish_run(ref, status=status, metrics=metrics)
    return result, counts, metrics


def choose_rows(source: Source, most: int | None) -> Int64Array:
    """All rows, or at most so many, spread evenly over the set."""
    if most is not None and most < 1:
        raise ValueError(f"--train-images is {most}: it must be at least 1.")
    count = min(source.num_rows, most or source.num_rows)
    return np.arange(count, dtype=np.int64) * source.num_rows // count


def check_voters(train_labels: Int64Array, labels: Int64Array, k: int) -> None:
    """Check by the labels alone that every image can be judged, before any is decoded.   Raises: ValueError."""
    voters = train_labels[train_labels >= 0]
    if len(voters) < k:
        raise ValueError(f"--k is {k}, but there are only {len(voters)} training images with a class: lower it.")
    lost = np.setdiff1d(labels[labels >= 0], voters)
    if len(lost):
        raise ValueError(
            f"{len(lost)} classes of the validation images have none among the {len(voters)} training images that "
            f"vote, for example class {lost[0]}: raise --train-images, or leave these classes out."
        )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(knn, Arguments, argv, program="knn.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
