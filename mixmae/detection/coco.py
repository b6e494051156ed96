"""The score of record: COCO's average precision, computed by pycocotools; and predictions as COCO writes them.

pycocotools is the optional part `dense`. Where faster-coco-eval is installed, it does the same counting faster (a test
compares them).

Legend: N classes, G objects of an image, D detections, T overlaps (0.50 to 0.95), R recalls, K classes, A ranges of
area, M numbers of detections.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Evaluator = Literal["auto", "pycocotools", "faster-coco-eval"]
"""auto: faster-coco-eval where it is installed."""

CONFUSION_IOU, CONFUSION_SCORE = 0.5, 0.5
"""A detection of at least this score is taken for the object that it overlaps by at least so much."""
_AREAS = ("all", "small", "medium", "large")
_KINDS = {"box": "bbox", "mask": "segm"}


def require_pycocotools() -> ModuleType:
    """pycocotools' masks.   Raises: ValueError with the remedy if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            "detection is scored by pycocotools, which is not installed: pip install 'mixmae[dense]'"
        ) from error
    return mask


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """What is known about the objects of an image."""

    image_id: int
    size: tuple[int, int]
    """(h, w) in pixels."""
    boxes: NDArray[np.float32]
    """(G, 4), x0 y0 x1 y1."""
    labels: NDArray[np.int64]
    """(G,) from 0."""
    areas: NDArray[np.float32]
    """(G,) pixels, which make an object small, medium or large."""
    crowd: NDArray[np.bool_]
    """(G,): a region of many objects, in which detections are not judged."""
    masks: Sequence[bytes]
    """G run-length masks of the image's size, COCO's compressed form; empty where there is a box alone."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """A class's line in the table; None where there is nothing to score."""

    name: str
    objects: int
    """Objects of the class, crowds left out."""
    ap: float | None
    ap50: float | None
    recall50: float | None
    """Share of its objects that are found at an overlap of 0.5, whatever the score."""
    mask_ap: float | None = None
    mask_ap50: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionScores:
    """How well objects are found."""

    figures: dict[str, float]
    """box_ap, box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large and box_ar; mask_* likewise, where there
    are masks. What there are no objects for is left out."""
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    """(N + 1, N + 1): objects of class i taken for class j; the last row is what was found where there is nothing, the
    last column what was missed."""


def write_rows(
    image_id: int,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: Iterable[NDArray[np.bool_]] | None,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """The detections of an image as COCO writes them.

    Args: boxes: (D, 4) in the image's own pixels.  masks: D of the image's size, or None.  category_ids: number of each
        class in its own file.
    """
    rows: list[dict[str, Any]] = []
    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        x0, y0, x1, y1 = box
        rows.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 5),
            }
        )
    if masks is not None:
        encode = require_pycocotools().encode
        for row, mask in zip(rows, masks, strict=True):
            encoded = encode(np.asfortranarray(mask, dtype=np.uint8))
            row["segmentation"] = {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}
    return rows


def truth_as_coco(
    truths: Sequence[ImageTruth], class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """The truth as a file of COCO instances."""
    annotations = [
        {
            "id": 0,
            "image_id": truth.image_id,
            "category_id": category_ids[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": area,
            "iscrowd": int(crowd),
            **({"segmentation": {"size": list(truth.size), "counts": mask.decode("ascii")}} if mask else {}),
        }
        for truth in truths
        for (x0, y0, x1, y1), label, area, crowd, mask in zip(
            truth.boxes.tolist(),
            truth.labels.tolist(),
            truth.areas.tolist(),
            truth.crowd.tolist(),
            truth.masks,
            strict=True,
        )
    ]
    for number, annotation in enumerate(annotations, start=1):  # 0 means "not matched" to pycocotools
        annotation["id"] = number
    return {
        "images": [{"id": truth.image_id, "height": truth.size[0], "width": truth.size[1]} for truth in truths],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)],
    }


def score_detections(
    truths: Sequence[ImageTruth],
    predictions: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    masks: bool = True,
    evaluator: Evaluator = "auto",
) -> DetectionScores:
    """Score predictions against the truth.

    Args: predictions: as write_rows makes them, of any order.  masks: score masks, too, if all objects have one.
    Raises: ValueError for predictions of unknown images or classes, or of numbers that are none.
    """
    check_predictions(predictions, {truth.image_id for truth in truths}, category_ids)
    content = truth_as_coco(truths, class_names, category_ids)
    kinds = ["box"]
    if masks and all("segmentation" in item for item in (*content["annotations"], *predictions)):
        kinds.append("mask")
    figures: dict[str, float] = {}
    columns: dict[str, dict[str, list[float | None]]] = {}
    for kind in kinds:
        evaluated = _evaluate(content, predictions, kind, evaluator)
        figures |= {f"{kind}_{name}": value for name, value in _figures(evaluated).items()}
        columns[kind] = _by_class(evaluated, len(class_names))
    counts = np.zeros(len(class_names), dtype=np.int64)
    for truth in truths:
        np.add.at(counts, truth.labels[~truth.crowd], 1)
    found = columns.get("mask", {})
    classes = tuple(
        ClassScore(
            name=name,
            objects=int(counts[index]),
            ap=columns["box"]["ap"][index],
            ap50=columns["box"]["ap50"][index],
            recall50=columns["box"]["recall50"][index],
            mask_ap=found["ap"][index] if found else None,
            mask_ap50=found["ap50"][index] if found else None,
        )
        for index, name in enumerate(class_names)
    )
    return DetectionScores(figures=figures, classes=classes, confusion=confusion(truths, predictions, category_ids))


def check_predictions(
    predictions: Sequence[Mapping[str, Any]], image_ids: set[int], category_ids: Sequence[int]
) -> None:
    """See that predictions, anybody's, are for these images and classes.   Raises: ValueError, naming the first row."""
    if not isinstance(predictions, Sequence) or isinstance(predictions, str | bytes):
        raise ValueError("predictions are a list of {image_id, category_id, bbox, score}: this is no list")
    known = set(category_ids)
    for number, row in enumerate(predictions):
        try:
            image_id, category_id, box, score = (row[name] for name in ("image_id", "category_id", "bbox", "score"))
            numbers = [float(value) for value in (*box, score)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"prediction {number} is not {{image_id, category_id, bbox [x, y, width, height], score}}: {error!r}"
            ) from error
        if image_id not in image_ids:
            raise ValueError(
                f"prediction {number} is for image {image_id}, which the set does not have: give the predictions of "
                "this set, with the image numbers of its own file"
            )
        if category_id not in known:
            raise ValueError(
                f"prediction {number} is of category {category_id}, and the set has "
                f"{', '.join(map(str, sorted(known)[:10]))}{', ...' if len(known) > 10 else ''}: predictions use the "
                "category numbers of the set's own file"
            )
        if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"prediction {number} has the box {box} and the score {score}: numbers are needed")


def confusion(
    truths: Sequence[ImageTruth], predictions: Sequence[Mapping[str, Any]], category_ids: Sequence[int]
) -> NDArray[np.int64]:
    """Count what objects were taken for, as DetectionScores.confusion.

    Detections of a score of at least CONFUSION_SCORE choose objects, the surest first, each the one that it overlaps
    most and that none chose before. Those that are mostly inside a crowd are left out.
    """
    nothing = len(category_ids)
    index_of = {number: index for index, number in enumerate(category_ids)}
    counts = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    for row in predictions:
        if row["score"] >= CONFUSION_SCORE:
            by_image.setdefault(row["image_id"], []).append(row)
    for truth in truths:
        free = np.flatnonzero(~truth.crowd).tolist()
        for row in sorted(by_image.get(truth.image_id, []), key=lambda row: -row["score"]):
            x, y, width, height = row["bbox"]
            box = np.array([x, y, x + width, y + height])
            shares = _overlaps(box, truth.boxes)
            best = free[int(shares[free].argmax())] if free else None
            label = index_of[row["category_id"]]
            if best is not None and shares[best] >= CONFUSION_IOU:
                counts[truth.labels[best], label] += 1
                free.remove(best)
            elif not (_overlaps(box, truth.boxes[truth.crowd], of_box=True) > CONFUSION_IOU).any():
                counts[nothing, label] += 1
        for index in free:
            counts[truth.labels[index], nothing] += 1
    return counts


def _overlaps(box: NDArray[Any], boxes: NDArray[Any], *, of_box: bool = False) -> NDArray[np.float64]:
    """Intersection over union, or over the box alone.   Args: box: (4,).  boxes: (G, 4).   Returns: (G,)."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    own, others = (box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    whole = own if of_box else own + others - common
    return np.asarray(common / np.maximum(whole, 1e-9), dtype=np.float64)


def _evaluate(
    truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: str, evaluator: Evaluator
) -> Any:
    """COCOeval, done with counting."""
    require_pycocotools()
    coco_class, eval_class = _classes(evaluator)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        gold = coco_class()
        gold.dataset = truth
        gold.createIndex()
        found = coco_class()
        found.dataset = {
            "images": truth["images"],
            "categories": truth["categories"],
            "annotations": _as_annotations(predictions, kind),
        }
        found.createIndex()
        evaluated = eval_class(gold, found, _KINDS[kind])
        evaluated.evaluate()
        evaluated.accumulate()
    return evaluated


def _as_annotations(predictions: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What COCO.loadRes makes of predictions, also of none; for masks the area is the mask's, as detectron2 does it."""
    area_of = require_pycocotools().area
    rows = []
    for number, row in enumerate(predictions, start=1):
        area = float(area_of(row["segmentation"])) if kind == "mask" else row["bbox"][2] * row["bbox"][3]
        rows.append({**row, "id": number, "iscrowd": 0, "area": area})
    return rows


def _classes(evaluator: Evaluator) -> tuple[Any, Any]:
    if evaluator != "pycocotools":
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError:
            if evaluator != "auto":
                raise
        else:
            return COCO, COCOeval_faster
    from pycocotools.coco import COCO as PlainCOCO
    from pycocotools.cocoeval import COCOeval

    return PlainCOCO, COCOeval


def _figures(evaluated: Any) -> dict[str, float]:
    precision, recall = evaluated.eval["precision"], evaluated.eval["recall"]  # (T, R, K, A, M), (T, K, A, M)
    overlaps = np.asarray(evaluated.params.iouThrs)
    values = {
        "ap": precision[:, :, :, 0, -1],
        "ap50": precision[np.isclose(overlaps, 0.5), :, :, 0, -1],
        "ap75": precision[np.isclose(overlaps, 0.75), :, :, 0, -1],
        **{f"ap_{name}": precision[:, :, :, index, -1] for index, name in enumerate(_AREAS) if index},
        "ar": recall[:, :, 0, -1],
    }
    means = {name: _mean(value) for name, value in values.items()}
    return {name: value for name, value in means.items() if value is not None}


def _by_class(evaluated: Any, num_classes: int) -> dict[str, list[float | None]]:
    precision, recall = evaluated.eval["precision"], evaluated.eval["recall"]
    half = int(np.argmin(np.abs(np.asarray(evaluated.params.iouThrs) - 0.5)))
    numbers = sorted(category["id"] for category in evaluated.cocoGt.dataset["categories"])
    places = [numbers.index(category["id"]) for category in evaluated.cocoGt.dataset["categories"]]
    return {
        "ap": [_mean(precision[:, :, place, 0, -1]) for place in places[:num_classes]],
        "ap50": [_mean(precision[half, :, place, 0, -1]) for place in places[:num_classes]],
        "recall50": [_mean(recall[half, place, 0, -1]) for place in places[:num_classes]],
    }


def _mean(values: NDArray[Any]) -> float | None:
    """The mean of what is known: -1 stands for a class without objects."""
    known = np.asarray(values)[np.asarray(values) > -1]
    return float(known.mean()) if known.size else None
