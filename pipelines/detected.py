"""What evaluate.py and predict.py do with a detection run: scores of a set with objects, objects in any images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixmae.data.annotated import Annotated, category_ids, object_classes, read_annotated, with_objects
from mixmae.data.blocks import BrokenRecord
from mixmae.data.broken import name_broken
from mixmae.data.channels import check_channels
from mixmae.data.source import DataError, Source
from mixmae.data.sources import list_splits, open_source
from mixmae.data.truth import read_truths
from mixmae.detection.coco import DetectionScores, score_detections
from mixmae.detection.pictures import draw_objects
from mixmae.jobs.detecting import Finder
from mixmae.jobs.detection import (
    CLASSES_FILE,
    CONFUSION_FILE,
    EVAL_IMAGES,
    PREDICTIONS_FILE,
    drawn,
    panel_of,
    predict_rows,
    rows_of,
    truths_of,
    worst_rows,
    write_classes,
    write_confusion,
)
from mixmae.jobs.supervised import WORST_FILE
from mixmae.training.run_folder import weights_of
from mixmae.writing import write_json, write_text, writing_table
from pipelines.segmented import decoded, stored_name


def evaluate_detection(finder: Finder, source: Source, model: Path, folder: Path) -> int:
    """Score a model on images with objects: metrics.json, classes.csv, confusion.csv, predictions.json, worst.png.

    Raises: DataError for a set without objects, or of other classes.
    """
    check_channels(source, finder.channels)
    dense, known = with_objects(source), object_classes(source)
    if known.objects != finder.class_names:
        raise DataError(
            f"{source.name} has other classes than the model ({len(known.objects or ())} and "
            f"{len(finder.class_names)}): evaluate it on the classes that it was trained for."
        )
    found: dict[int, list[dict[str, Any]]] = {}
    broken: list[BrokenRecord] = []
    start = time.monotonic()
    rows = np.arange(source.num_rows)
    for batch in read_annotated(dense, rows, channels=finder.channels, batch_size=EVAL_IMAGES):
        broken += [item for item in batch if isinstance(item, BrokenRecord)]
        found |= predict_rows(finder, [item for item in batch if isinstance(item, Annotated)])
    images_per_s = len(found) / (time.monotonic() - start)
    truths, predictions = truths_of(dense, found)
    numbers = category_ids(known)
    scores = score_detections(truths, predictions, finder.class_names, numbers, masks=finder.model.config.masks)
    if not scores.figures:
        raise DataError(f"no image of {source.name} has an object: there is nothing to judge by.")
    worst = worst_rows(truths, found, numbers)
    batches = read_annotated(dense, np.array(sorted(worst)), channels=finder.channels, batch_size=EVAL_IMAGES)
    shown = {item.row: item for batch in batches for item in batch if isinstance(item, Annotated)}
    panel_of(finder, [shown[row] for row in worst if row in shown]).save(folder / WORST_FILE)
    write_results(scores, predictions, finder.class_names, folder)
    content = {
        "model": str(weights_of(model)),
        "data": {"name": source.name, "digest": source.digest},
        **scores.figures,
        "num_judged": len(found),
        "num_broken": len(broken),
        "images_per_s": images_per_s,
    }
    write_json(folder / "metrics.json", content)
    print(
        f"{weights_of(model)} on {source.name}: {summary(scores)}\n"
        f"{len(found)} images judged; {images_per_s:.1f} images/s on {finder.device.type}\n"
        f"{folder}: metrics.json, {CLASSES_FILE}, {CONFUSION_FILE}, {PREDICTIONS_FILE}, {WORST_FILE}"
    )
    if broken:
        print(f"left out: {name_broken(broken, source.num_rows)}")
    return 0


def evaluate_predictions(file: Path, source: Source, folder: Path) -> int:
    """Score somebody's predictions, in COCO's form and with the set's own numbers of images and categories.

    Raises: DataError for a set without objects; ValueError for a file that is not for this set.
    """
    dense, known = with_objects(source), object_classes(source)
    try:
        predictions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the predictions {file} cannot be read: {reason}") from error
    truths, _ = truths_of(dense, {row: [] for row in _known_rows(dense)})
    names = known.objects or ()
    scores = score_detections(truths, predictions, names, category_ids(known))
    if not scores.figures:
        raise DataError(f"no image of {source.name} has an object: there is nothing to judge by.")
    folder.mkdir(parents=True, exist_ok=True)
    write_results(scores, None, names, folder)
    content = {"predictions": str(file), "data": {"name": source.name, "digest": source.digest}, **scores.figures}
    write_json(folder / "metrics.json", content)
    print(
        f"{file} on {source.name}: {summary(scores)}\n"
        f"{len(predictions)} detections in {len(truths)} images\n"
        f"{folder}: metrics.json, {CLASSES_FILE}, {CONFUSION_FILE}"
    )
    return 0


def predict_detection(finder: Finder, images: str, folder: Path) -> int:
    """Find the objects of images: predictions.json as COCO writes it, overlays/*.png, predictions.csv."""
    sources = [open_source(images, split) for split in list_splits(images)]
    broken: list[BrokenRecord] = []
    rows: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    names: set[str] = set()
    count = 0
    folder.mkdir(parents=True, exist_ok=True)
    with writing_table(folder / "predictions.csv") as table:
        table.writerow(["file", "class", "score", "x0", "y0", "x1", "y1", "problem"])
        for number, source in enumerate(sources):
            check_channels(source, finder.channels)
            for row, sample, pixels in decoded(source, finder.channels):
                count += 1
                if isinstance(pixels, str):
                    broken.append(BrokenRecord(row, sample.where, pixels))
                    table.writerow([sample.where, "", "", "", "", "", "", pixels])
                    continue
                (objects,) = finder.find([pixels])
                name = stored_name(sample.path, f"{number}_{row:07d}", names)
                listed.append(
                    {"id": count, "file_name": sample.path, "height": pixels.shape[0], "width": pixels.shape[1]}
                )
                rows += rows_of(finder, objects, pixels.shape, count)
                picture = folder / "overlays" / f"{name}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                draw_objects(pixels, drawn(objects, pixels.shape), finder.class_names).save(picture)
                for box, score, label in zip(
                    objects.boxes.tolist(), objects.scores.tolist(), objects.labels.tolist(), strict=True
                ):
                    corners = [f"{value:.1f}" for value in box]
                    table.writerow([sample.where, finder.class_names[label], f"{score:.4f}", *corners, ""])
    if len(broken) == count:
        raise DataError(f"no image of {images} could be decoded, for example {broken[0].where}: {broken[0].reason}.")
    write_text(folder / PREDICTIONS_FILE, json.dumps(rows))
    categories = [
        {"id": number, "name": name} for number, name in zip(finder.category_ids, finder.class_names, strict=True)
    ]
    write_json(folder / "images.json", {"images": listed, "categories": categories})
    print(
        f"{folder}: {PREDICTIONS_FILE} ({len(rows)} objects in {count} images; images.json has their numbers), "
        "predictions.csv, overlays/"
    )
    if broken:
        print(f"no objects: {name_broken(broken, count)}")
    return 0


def write_results(
    scores: DetectionScores, predictions: Sequence[Any] | None, class_names: Sequence[str], folder: Path
) -> None:
    """Write the tables, and the predictions if they are not somebody else's."""
    with writing_table(folder / CLASSES_FILE) as table:
        write_classes(table, scores)
    with writing_table(folder / CONFUSION_FILE) as table:
        write_confusion(table, scores, class_names)
    if predictions is not None:
        write_text(folder / PREDICTIONS_FILE, json.dumps(predictions))


def summary(scores: DetectionScores) -> str:
    """The usual figures in a line."""
    parts = []
    for kind in ("box", "mask"):
        if f"{kind}_ap" in scores.figures:
            values = (f"{name.upper()} {scores.figures[f'{kind}_{name}']:.2%}" for name in ("ap", "ap50", "ap75"))
            parts.append(f"{kind} {', '.join(values)}")
    return "; ".join(parts)


def _known_rows(source: Any) -> list[int]:
    """The rows whose objects are known."""
    truths = read_truths(source, np.arange(source.num_rows))
    return [row for row, truth in enumerate(truths) if truth.objects is not None]
