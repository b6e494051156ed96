"""Classify images by their nearest neighbours among an encoder's features: what they say of classes without training.

    python pipelines/knn.py WEIGHTS [--data SOURCE] [--k 20] [--output FOLDER]

WEIGHTS is a run's folder or one of its checkpoints, an encoder file, a hub folder, or weights of any other format in
docs/weights.md. Each image of the training and of the validation split goes through the encoder once. Written is
knn.json; MLflow keeps a run, which points at the one that the weights are of.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from mixmae.data.chunks import Int64Array
from mixmae.data.classes import read_classes
from mixmae.data.prepare import open_for_training
from mixmae.data.source import Source
from mixmae.data.sources.storage import writable_folder
from mixmae.jobs.classification import HELDOUT_IMAGES
from mixmae.probing.knn import KnnConfig, KnnResult, knn_classify
from mixmae.tracking import create_run, finish_run, resolve_uri, tag_run
from mixmae.training.run_folder import run_around
from pipelines.console import fail
from pipelines.features import FrozenEncoder, load_frozen


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which encoder, on which images, with how many neighbours."""

    weights: tyro.conf.Positional[Path]
    """A run's folder or checkpoint, an encoder file, a hub folder, others' weights."""
    data: str | None = None
    """Labelled images (docs/data.md), as for pretraining. Without it: the built-in set of shapes."""
    k: int = 20
    """Training images that vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine / temperature)."""
    train_images: int | None = None
    """Most training images that are looked at, spread evenly over the set. Default: all."""
    output: Path | None = None
    """Folder for knn.json. Default: evaluations/NAME, after the run or the file."""
    batch_size: int = 64
    """Images that are looked at at once."""
    resize_share: float = 0.875
    """Side of the images' central crop over that of the whole."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the encoder runs; auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder; bfloat16 is about twice as fast on a GPU."""
    mlflow_uri: str | None = None
    """Tracking server. Default: MLFLOW_TRACKING_URI, else mlflow.db beside the run, or in runs/."""
    experiment: str = "mixmae-knn"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the name of the run or the file."""


def knn(arguments: Arguments) -> int:
    """Judge the encoder and write what came of it.   Returns: the process's exit status."""
    config = KnnConfig(k=arguments.k, temperature=arguments.temperature)
    frozen = load_frozen(
        arguments.weights,
        device=arguments.device,
        resize_share=arguments.resize_share,
        batch_size=arguments.batch_size,
        bfloat16=arguments.precision == "bfloat16",
    )
    run = run_around(arguments.weights)
    base = run.parent if run else Path("runs")
    train, validation = open_for_training(arguments.data, base / "data", HELDOUT_IMAGES)
    classes = read_classes(train, validation)
    rows = choose_rows(train, arguments.train_images)
    check_voters(train.read_labels()[rows], validation.read_labels(), config.k)
    name = run.name if run else arguments.weights.resolve().stem
    folder = writable_folder(arguments.output or Path("evaluations") / name)

    data = {"name": train.name, "digest": train.digest, "source": arguments.data or "built-in"}
    facts: dict[str, Any] = {
        "weights": str(frozen.path),
        "weights_digest": frozen.digest,
        "k": config.k,
        "temperature": config.temperature,
        "classes": len(classes),
        "train_images": len(rows),
        "validation_images": validation.num_rows,
        "image_size": list(frozen.preprocessing.image_size),
        "resize_share": frozen.resize_share,
        "precision": arguments.precision,
    }
    tags = {"stage": "knn", "pretrained": str(frozen.path)}
    if frozen.run_id:
        tags["pretrained.run_id"] = frozen.run_id
    ref = create_run(
        uri=resolve_uri(arguments.mlflow_uri, base),
        experiment=arguments.experiment,
        name=arguments.run_name or name,
        params=facts,
        tags=tags,
        dataset=data,
    )
    status: str = "FAILED"
    metrics: dict[str, float] = {}
    try:
        start = time.monotonic()
        result = classify(frozen, train, rows, validation, len(classes), config)
        looked = len(rows) + validation.num_rows
        metrics = {
            "val/top1": result.accuracy.top[1],
            "val/top5": result.accuracy.top[5],
            "perf/images_per_s": looked / (time.monotonic() - start),
        }
        status = "FINISHED"
    finally:
        with contextlib.suppress(Exception):  # the store's trouble must not hide the result
            finish_run(ref, status=status, metrics=metrics)
    if frozen.run_id:
        tag_run(ref.uri, frozen.run_id, f"knn.{ref.run_id}", f"top-1 {metrics['val/top1']:.4f}")
    content = {
        "run_id": ref.run_id,
        "pretrained_run_id": frozen.run_id,
        "data": {"train": data, "validation": {"name": validation.name, "digest": validation.digest}},
        **facts,
        "top1": metrics["val/top1"],
        "top5": metrics["val/top5"],
        "num_judged": result.accuracy.num_judged,
        "images_per_s": metrics["perf/images_per_s"],
    }
    file = folder / "knn.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(
        f"kNN of {frozen.path} on {validation.name}: top-1 {content['top1']:.2%}, top-5 {content['top5']:.2%} "
        f"(k = {config.k}, a guess: {1 / len(classes):.2%})\n"
        f"{len(rows)} training and {result.accuracy.num_judged} validation images, {content['images_per_s']:.0f} "
        f"images/s on {frozen.device.type}\n"
        f"{file}\nMLflow UI   {ref.ui_command}"
    )
    return 0


def choose_rows(source: Source, most: int | None) -> Int64Array:
    """All rows, or so many spread evenly over the set."""
    if most is not None and most < 1:
        raise ValueError(f"--train-images is {most}: it must be at least 1.")
    count = min(source.num_rows, most or source.num_rows)
    return np.arange(count, dtype=np.int64) * source.num_rows // count


def check_voters(train_labels: Int64Array, labels: Int64Array, k: int) -> None:
    """See from the labels alone that every image can be judged, before all are looked at.   Raises: ValueError."""
    voters = train_labels[train_labels >= 0]
    if len(voters) < k:
        raise ValueError(f"--k is {k}, but there are only {len(voters)} training images with a class: lower it.")
    lost = np.setdiff1d(labels[labels >= 0], voters)
    if len(lost):
        raise ValueError(
            f"{len(lost)} classes of the validation images have none among the {len(voters)} training images that "
            f"vote, for example class {lost[0]}: raise --train-images, or leave these classes out."
        )


def classify(
    frozen: FrozenEncoder, train: Source, rows: Int64Array, validation: Source, num_classes: int, config: KnnConfig
) -> KnnResult:
    """Features of both sets, and the votes, on the encoder's device."""
    features, labels = frozen.features(train, rows)
    judged, classes = frozen.features(validation)
    return knn_classify(features.to(frozen.device), labels, judged, classes, num_classes=num_classes, config=config)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = tyro.cli(Arguments, args=argv, prog="knn.py", description=__doc__)
    try:
        return knn(arguments)
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


if __name__ == "__main__":
    sys.exit(main())
