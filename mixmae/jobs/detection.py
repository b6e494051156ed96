"""Finetuning a pretrained encoder, or training one from scratch, to find objects: a run as its workers see it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from mixmae.data.annotated import (
    Annotated,
    category_ids,
    check_objects,
    distinct_ids,
    fitted_sides,
    object_classes,
    read_annotated,
    with_objects,
)
from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.rle import decode_rle
from mixmae.data.source import DataError, Source
from mixmae.data.truth import DenseSource, read_truths
from mixmae.detection.coco import (
    DetectionScores,
    ImageTruth,
    confusion,
    require_pycocotools,
    score_detections,
    write_rows,
)
from mixmae.detection.losses import detection_step
from mixmae.detection.model import Detector
from mixmae.detection.pictures import SHOWN_SCORE, Drawn, Row, detection_panel
from mixmae.encoders.build import build_encoder
from mixmae.jobs.config import DetectConfig
from mixmae.jobs.detecting import Finder, finder_of, pasted
from mixmae.jobs.supervised import WORST, WORST_FILE, SupervisedJob
from mixmae.machine import threads_per_process
from mixmae.objects import Detections, unpack_targets
from mixmae.step import StepOutput
from mixmae.tracking import JournalTracker
from mixmae.training.checkpoint import read_state
from mixmae.training.failures import TrainingStopped
from mixmae.training.loop import TrainState
from mixmae.writing import write_text, writing, writing_table

EVAL_IMAGES = 16
"""Images that a worker evaluates at once."""
PANEL_IMAGES = 8
"""Validation images that a panel shows, spread over the set: the same at each evaluation."""
CURVES = 32
"""Most classes that get a curve of their own; all are in classes.csv."""
CLASSES_FILE, CONFUSION_FILE, PREDICTIONS_FILE = "classes.csv", "confusion.csv", "predictions.json"
_NOTHING = "(nothing)"
_OUT_OF_REACH = 0.05
"""Share of objects too small or too large for all anchors that a run is told of."""


@dataclass(frozen=True, kw_only=True)
class DetectionJob(SupervisedJob):
    """Mask R-CNN on an encoder; the whole validation set is evaluated, images fitted into the canvas."""

    stage = "detect"
    doing = "Detecting"
    best_metric = "val/box_ap"
    figures = ("box_ap", "box_ap50")
    default_data = "scenes"

    config: DetectConfig

    @classmethod
    def read_classes(cls, source: Source, validation: Source, config: DetectConfig) -> Sequence[str]:
        try:
            require_pycocotools()
        except ValueError as error:
            raise DataError(str(error)) from error
        for images in (source, validation):
            check_objects(with_objects(images), config.loop.is_hopeless, masks=config.detector.masks)
        ours, theirs = object_classes(source), object_classes(validation)
        if (ours.objects, ours.object_ids) != (theirs.objects, theirs.object_ids):
            raise DataError(f"{source.name} and {validation.name} have other classes: pack them as one set.")
        assert ours.objects is not None
        return ours.objects

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The number of each class in its own file."""
        return category_ids(object_classes(self.validation))

    @property
    def sizes_line(self) -> str:
        """How large objects are beside the anchors, and what to do if many of them are out of their reach."""
        canvas, anchors = self.config.augment.size, self.config.detector.anchor_sizes
        sides = fitted_sides(with_objects(self.source), canvas)
        quantiles = ", ".join(f"{share:.0%} {np.quantile(sides, share):.0f}" for share in (0.05, 0.5, 0.95))
        line = f"sides of objects on the canvas: {quantiles} px; anchors of {min(anchors)} to {max(anchors)} px"
        # A square of half an anchor's side overlaps it by a quarter: less than what counts as no background at all.
        small, large = (sides < min(anchors) / 2).mean(), (sides > 2 * max(anchors)).mean()
        if small > _OUT_OF_REACH:
            line += (
                f"\nnote: {small:.0%} of the objects are smaller than half of the smallest anchor and will hardly be "
                "found: give smaller --detector.anchor-sizes, or a larger --augment.image-size"
            )
        if large > _OUT_OF_REACH:
            line += (
                f"\nnote: {large:.0%} of the objects are larger than twice the largest anchor and will hardly be "
                "found: give larger --detector.anchor-sizes"
            )
        return line

    @property
    def uniform_loss(self) -> float:
        """Of classes and background, objectness, masks, and boxes, which have about one."""
        return math.log(self.num_classes + 1) + 2 * math.log(2) + 1

    @property
    def pictures(self) -> Mapping[str, str]:
        return {
            CLASSES_FILE: "AP and recall of each class",
            CONFUSION_FILE: "what objects were taken for",
            WORST_FILE: "the images with the most mistakes",
        }

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "category_ids": list(self.category_ids)}

    def build_model(self) -> nn.Module:
        model = Detector(build_encoder(self.config.sized_encoder()), self.num_classes, self.config.detector)
        if dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in dist.get_backend():
            # Torch has no batch norm over several workers for CPUs: there each has the statistics of its own images.
            return self.with_initial(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        return self.with_initial(model)

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        images = self.images_on_device(model, batch.images)
        targets = unpack_targets(batch.targets, self.config.augment.size, images.device)
        return detection_step(model, images, targets, generator, first_sample)

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """COCO's figures of the whole validation set, of which each worker evaluates its part. Rank 0 scores them, and
        writes classes.csv, confusion.csv, predictions.json and worst.png."""
        if num_workers > 1:  # rank 0's statistics of batch norms are those that are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        finder = finder_of(model, self.config, self.classes, self.category_ids)
        rows = np.array_split(np.arange(self.validation.num_rows), num_workers)[rank]
        with ThreadPoolExecutor(threads_per_process(num_workers)) as pool:
            found = {
                row: predictions
                for batch in self._images(rows, pool)
                for row, predictions in predict_rows(finder, batch)
            }
        if num_workers > 1:
            parts: list[Any] = [None] * num_workers
            dist.all_gather_object(parts, found)
            found = {row: predictions for part in parts for row, predictions in part.items()}
        answer: list[Any] = [self._score(finder, found) if rank == 0 else None]
        if num_workers > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[0] is None:
            raise TrainingStopped(
                f"No image of {self.validation.name} could be used, or none has an object: repair it, or leave the "
                "validation set out, so that training images are held out."
            )
        return answer[0]

    def final_metrics(self, state: TrainState) -> dict[str, float]:
        """final/* of the last evaluation, best/* of the best one: all of COCO's figures; and best/step."""
        best = read_state(self.best[1])
        both = {"final": state.metrics, "best": best["metrics"]}
        numbers = {
            f"{kind}/{name.removeprefix('val/')}": value
            for kind, metrics in both.items()
            for name, value in metrics.items()
            if name.startswith("val/")
        }
        return {**numbers, "best/step": float(best["position"]["step"])}

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """Truth beside prediction of the same validation images each time."""
        if not self._shown:
            return None, {}
        finder = finder_of(model, self.config, self.classes, self.category_ids)
        return panel_of(finder, self._shown), {}

    def open_tracker(self) -> JournalTracker:
        return JournalTracker(self.folder, panel="detection")

    @cached_property
    def _shown(self) -> list[Annotated]:
        count = self.validation.num_rows
        rows = np.unique(np.linspace(0, count - 1, min(PANEL_IMAGES, count)).astype(np.int64))
        return [item for batch in self._images(rows, None) for item in batch]

    def _images(self, rows: Int64Array, pool: ThreadPoolExecutor | None) -> Iterator[list[Annotated]]:
        """Validation images that can be used, in batches; the others are noted."""
        source, channels = with_objects(self.validation), self.config.encoder.in_channels
        for batch in read_annotated(source, rows, channels=channels, batch_size=EVAL_IMAGES, pool=pool):
            self.broken.update({item.where: item for item in batch if isinstance(item, BrokenRecord)})
            yield [item for item in batch if isinstance(item, Annotated)]

    def _score(self, finder: Finder, found: Mapping[int, list[dict[str, Any]]]) -> dict[str, float] | None:
        """The figures of an evaluation; None if there is nothing to judge by."""
        truths, predictions = truths_of(with_objects(self.validation), found)
        scores = score_detections(
            truths, predictions, self.classes, self.category_ids, masks=self.config.detector.masks
        )
        if not scores.figures:
            return None
        with writing_table(self.folder / CLASSES_FILE) as table:
            write_classes(table, scores)
        with writing_table(self.folder / CONFUSION_FILE) as table:
            write_confusion(table, scores, self.classes)
        write_text(self.folder / PREDICTIONS_FILE, json.dumps(predictions))
        worst = worst_rows(truths, found, self.category_ids)
        items = {item.row: item for batch in self._images(np.array(sorted(worst)), None) for item in batch}
        with writing(self.folder / WORST_FILE) as partial:
            panel_of(finder, [items[row] for row in worst if row in items]).save(partial)  # a file may be gone by now
        figures = {f"val/{name}": value for name, value in scores.figures.items()}
        if self.num_classes <= CURVES:
            figures |= {f"ap/{plain_name(item.name)}": item.ap for item in scores.classes if item.ap is not None}
        return figures


def plain_name(name: str) -> str:
    """A class's name as MLflow takes it in the name of a metric."""
    return re.sub(r"[^\w. -]", "_", name)


def predict_rows(finder: Finder, images: Sequence[Annotated]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each image's row with its detections as COCO writes them, under the row as image_id."""
    for item, objects in zip(images, finder.find([item.pixels for item in images]), strict=True):
        yield item.row, rows_of(finder, objects, item.pixels.shape, item.row)


def rows_of(finder: Finder, objects: Detections, size: tuple[int, ...], image_id: int) -> list[dict[str, Any]]:
    """An image's detections as COCO writes them."""
    masks = None if objects.masks is None else pasted(objects, size)
    boxes, scores, labels = (part.numpy() for part in (objects.boxes, objects.scores, objects.labels))
    return write_rows(image_id, boxes, scores, labels, masks, finder.category_ids)


def truths_of(
    source: DenseSource, found: Mapping[int, list[dict[str, Any]]]
) -> tuple[list[ImageTruth], list[dict[str, Any]]]:
    """The truth of the images that were looked at, and what was found in them, both under the images' own numbers.

    Args: found: by row.
    """
    truths = read_truths(source, np.arange(source.num_rows))
    numbers = distinct_ids(truths)
    known = [image_truth(numbers[row], truths[row]) for row in sorted(found)]
    predictions = [{**item, "image_id": numbers[row]} for row in sorted(found) for item in found[row]]
    return known, predictions


def worst_rows(
    truths: Sequence[ImageTruth], found: Mapping[int, list[dict[str, Any]]], category_ids: Sequence[int]
) -> list[int]:
    """The rows of the images in which most objects are missed, invented or taken for others, at most WORST of them.

    Args: truths, found: as truths_of gives and takes them.
    Returns: the worst first.
    """
    mistakes = []
    for truth, row in zip(truths, sorted(found), strict=True):
        own = [{**item, "image_id": truth.image_id} for item in found[row]]
        counts = confusion([truth], own, category_ids)
        mistakes.append((int(counts.trace() - counts.sum()), row))
    return [row for _, row in sorted(mistakes)[:WORST]]


def image_truth(number: int, truth: Any) -> ImageTruth:
    """What the score needs to know about an image.   Args: number: of the image."""
    objects = truth.objects
    return ImageTruth(number, truth.size, objects.boxes, objects.labels, objects.areas, objects.crowd, objects.masks)


def panel_of(finder: Finder, images: Sequence[Annotated]) -> Image.Image:
    """Truth beside what is found."""
    rows = []
    for item, objects in zip(images, finder.find([item.pixels for item in images]), strict=True):
        size, truth = (item.pixels.shape[0], item.pixels.shape[1]), item.objects
        masks = [decode_rle(mask, size) for mask in truth.masks] if all(truth.masks) else []
        rows.append(Row(item.pixels, Drawn(truth.boxes, truth.labels, None, masks), drawn(objects, size)))
    return detection_panel(rows, finder.class_names)


def drawn(objects: Detections, size: tuple[int, ...]) -> Drawn:
    """What a picture shows of an image's detections: those that are sure enough."""
    sure = objects.scores >= SHOWN_SCORE
    masks = None if objects.masks is None else objects.masks[sure]
    kept = Detections(objects.boxes[sure], objects.scores[sure], objects.labels[sure], masks)
    shapes = [] if masks is None else list(pasted(kept, size))
    return Drawn(kept.boxes.numpy(), kept.labels.numpy(), kept.scores.numpy(), shapes)


def write_classes(writer: Any, scores: DetectionScores) -> None:
    """Write the table of classes; what a class has no figure for, because it has no objects, stays empty."""
    writer.writerow(["class", "name", "objects", "ap", "ap50", "recall50", "mask_ap", "mask_ap50"])
    for index, item in enumerate(scores.classes):
        values = (item.ap, item.ap50, item.recall50, item.mask_ap, item.mask_ap50)
        writer.writerow(
            [index, item.name, item.objects, *("" if value is None else f"{value:.4f}" for value in values)]
        )


def write_confusion(writer: Any, scores: DetectionScores, class_names: Iterable[str]) -> None:
    """Write what objects were taken for: a row for each class and for what was found where there is nothing."""
    names = [*class_names, _NOTHING]
    writer.writerow(["object \\ found", *names])
    for name, counts in zip(names, scores.confusion.tolist(), strict=True):
        writer.writerow([name, *counts])
