"""Average precision of drawings, of the built-in scenes, and of files that somebody else made."""

import builtins
import json
from dataclasses import replace

import numpy as np
import pytest

from mixmae.data.rle import decode_rle, encode_rle
from mixmae.data.shards import scenes
from mixmae.detection.coco import (
    ImageTruth,
    check_predictions,
    confusion,
    require_pycocotools,
    score_detections,
    truth_as_coco,
    write_rows,
)

pytest.importorskip("pycocotools")
CATEGORY_IDS = (3, 18, 90)
"""With gaps, and not from 0: as COCO's."""
NAMES = ("cup", "dog", "kite")


def drawn(image_id, *objects, crowd=(), size=(100, 120)):
    """objects: (label, x0, y0, x1, y1) each, with a mask that fills the box."""
    boxes = np.array([box for _, *box in objects], dtype=np.float32).reshape(-1, 4)
    masks = []
    for x0, y0, x1, y1 in boxes.astype(int).tolist():
        mask = np.zeros(size, dtype=np.bool_)
        mask[y0:y1, x0:x1] = True
        masks.append(mask)
    return ImageTruth(
        image_id=image_id,
        size=size,
        boxes=boxes,
        labels=np.array([label for label, *_ in objects], dtype=np.int64),
        areas=np.array([mask.sum() for mask in masks], dtype=np.float32),
        crowd=np.array([index in crowd for index in range(len(objects))], dtype=np.bool_),
        masks=tuple(map(encode_rle, masks)),
    )


def as_predictions(truths, *, score=0.9, masks=True, shift=0.0):
    rows = []
    for truth in truths:
        pictures = [decode_rle(mask, truth.size) for mask in truth.masks] if masks else None
        scores = np.full(len(truth.labels), score, dtype=np.float32)
        rows += write_rows(truth.image_id, truth.boxes + shift, scores, truth.labels, pictures, CATEGORY_IDS)
    return json.loads(json.dumps(rows))


def two_images():
    return [
        drawn(7, (0, 10, 10, 30, 40), (1, 50, 20, 110, 90)),
        drawn(1234, (0, 0, 0, 20, 20)),
        drawn(55),
    ]


def scene_truths(count):
    drawings = [scenes.draw(0, index).truth for index in range(count)]
    return [
        ImageTruth(
            t.image_id, t.size, t.objects.boxes, t.objects.labels, t.objects.areas, t.objects.crowd, t.objects.masks
        )
        for t in drawings
    ]


def test_the_truth_is_perfect():
    truths = two_images()
    scores = score_detections(truths, as_predictions(truths), NAMES, CATEGORY_IDS)
    assert scores.figures["box_ap"] == scores.figures["mask_ap"] == pytest.approx(1.0)
    assert {name for name, value in scores.figures.items() if value < 0.999} == set()
    assert [item.objects for item in scores.classes] == [2, 1, 0]
    assert [item.ap for item in scores.classes] == [pytest.approx(1.0), pytest.approx(1.0), None]  # no kites
    assert scores.confusion.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_truth_of_scenes_is_perfect():
    truths = scene_truths(12)
    ids = tuple(range(1, 7))
    rows = []
    for truth in truths:
        masks = [decode_rle(mask, truth.size) for mask in truth.masks]
        rows += write_rows(truth.image_id, truth.boxes, np.ones(len(masks), np.float32), truth.labels, masks, ids)
    scores = score_detections(truths, rows, scenes.CLASS_NAMES, ids)
    assert scores.figures["box_ap"] == scores.figures["mask_ap"] == pytest.approx(1.0)


def test_nothing_found_is_nothing():
    scores = score_detections(two_images(), [], NAMES, CATEGORY_IDS)
    assert scores.figures["box_ap"] == scores.figures["box_ap50"] == scores.figures["box_ar"] == 0
    assert scores.confusion[:2, 3].tolist() == [2, 1]


def test_a_shifted_box_counts_at_small_overlaps_only():
    """A box of 20 px that is 4 px off on both axes overlaps by 256 / 544 = 0.47; 3 px, 289 / 511 = 0.57."""
    truths = [drawn(1, (0, 20, 20, 40, 40))]
    near = score_detections(truths, as_predictions(truths, masks=False, shift=3.0), NAMES, CATEGORY_IDS).figures
    far = score_detections(truths, as_predictions(truths, masks=False, shift=4.0), NAMES, CATEGORY_IDS).figures
    assert near["box_ap50"] == pytest.approx(1.0)
    assert near["box_ap"] == pytest.approx(0.2)  # at 0.50 and 0.55 of ten
    assert far["box_ap50"] == 0
    assert "mask_ap" not in near


def test_crowds_are_not_judged():
    plain = drawn(1, (0, 10, 10, 30, 30), (0, 40, 40, 90, 90))
    with_crowd = drawn(1, (0, 10, 10, 30, 30), (0, 40, 40, 90, 90), crowd={1})
    right = as_predictions([drawn(1, (0, 10, 10, 30, 30))])
    inside = as_predictions([drawn(1, (0, 45, 45, 60, 60))], score=0.95)
    assert score_detections([with_crowd], right, NAMES, CATEGORY_IDS).figures["box_ap"] == pytest.approx(1.0)
    both = score_detections([with_crowd], inside + right, NAMES, CATEGORY_IDS)
    assert both.figures["box_ap"] == pytest.approx(1.0)  # what lies inside a crowd is no mistake
    assert both.classes[0].objects == 1
    assert both.confusion.sum() == 1
    assert score_detections([plain], inside + right, NAMES, CATEGORY_IDS).figures["box_ap"] < 0.6


def test_confusion_by_hand():
    truth = drawn(1, (0, 0, 0, 20, 20), (1, 50, 50, 80, 80), (2, 90, 0, 110, 20))
    seen = drawn(1, (0, 1, 0, 20, 20), (2, 50, 50, 80, 78), (0, 0, 70, 20, 90), (0, 0, 0, 21, 20))
    rows = as_predictions([seen])
    rows[3]["score"] = 0.6  # a second detection of the first object, less sure: it was not there
    counts = confusion([truth], rows, CATEGORY_IDS)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [2, 0, 0, 0]]
    rows[2]["score"] = 0.4  # too unsure to count
    assert confusion([truth], rows, CATEGORY_IDS)[3].tolist() == [1, 0, 0, 0]


def test_size_classes_follow_the_area_of_the_mask():
    truths = [drawn(1, (0, 0, 0, 31, 31), (0, 40, 0, 73, 33))]
    assert {"box_ap_small", "box_ap_medium"} <= score_detections(truths, [], NAMES, CATEGORY_IDS).figures.keys()
    assert "box_ap_large" not in score_detections(truths, [], NAMES, CATEGORY_IDS).figures


def test_a_thin_object_is_small_by_its_mask_though_its_box_is_not():
    """Two bars across a box of 40 px, 400 of its 1,600 pixels. A mistake of that kind counts among small masks."""
    thin = np.zeros((100, 120), dtype=np.bool_)
    thin[10:15, 10:50], thin[45:50, 10:50] = True, True
    elsewhere = np.roll(thin, (40, 60), axis=(0, 1))
    box = np.array([[10, 10, 50, 50]], dtype=np.float32)
    truth = replace(drawn(1, (0, 10, 10, 50, 50)), areas=np.array([400], np.float32), masks=(encode_rle(thin),))
    one, two = (np.array([score], dtype=np.float32) for score in (0.5, 0.9))
    label = np.zeros(1, dtype=np.int64)
    rows = write_rows(1, box, one, label, [thin], CATEGORY_IDS)
    rows += write_rows(1, box + np.float32([60, 40, 60, 40]), two, label, [elsewhere], CATEGORY_IDS)
    figures = score_detections([truth], rows, NAMES, CATEGORY_IDS).figures
    assert figures["mask_ap_small"] == pytest.approx(0.5)
    assert "mask_ap_medium" not in figures


def test_both_evaluators_agree():
    pytest.importorskip("faster_coco_eval")
    truths = scene_truths(20)
    ids = tuple(range(1, 7))
    generator = np.random.default_rng(0)
    rows = []
    for truth in truths:
        keep = generator.random(len(truth.labels)) < 0.9
        boxes = truth.boxes[keep] + generator.normal(0, 3, (keep.sum(), 4)).astype(np.float32)
        labels = np.where(generator.random(keep.sum()) < 0.2, generator.integers(0, 6, keep.sum()), truth.labels[keep])
        pairs = zip(truth.masks, keep, strict=True)
        masks = [np.roll(decode_rle(mask, truth.size), 2, axis=0) for mask, kept in pairs if kept]
        scores = generator.random(keep.sum()).astype(np.float32)
        rows += write_rows(truth.image_id, boxes, scores, labels, masks, ids)
    plain, fast = (
        score_detections(truths, rows, scenes.CLASS_NAMES, ids, evaluator=name)
        for name in ("pycocotools", "faster-coco-eval")
    )
    assert 0.1 < plain.figures["box_ap"] < 0.9
    assert plain.figures == pytest.approx(fast.figures)
    assert plain.classes == fast.classes
    crowded = [
        ImageTruth(t.image_id, t.size, t.boxes, t.labels, t.areas, np.arange(len(t.labels)) == 0, t.masks)
        for t in truths
    ]
    plain, fast = (
        score_detections(crowded, rows, scenes.CLASS_NAMES, ids, evaluator=name).figures
        for name in ("pycocotools", "faster-coco-eval")
    )
    assert plain == pytest.approx(fast)


def test_numbers_of_images_and_classes_are_the_files_own():
    rows = as_predictions(two_images())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(7, 3), (7, 18), (1234, 3)]
    assert rows[0]["bbox"] == [10, 10, 20, 30]
    assert rows[0]["segmentation"]["size"] == [100, 120]
    content = truth_as_coco(two_images(), NAMES, CATEGORY_IDS)
    assert [item["id"] for item in content["categories"]] == list(CATEGORY_IDS)
    assert len({item["id"] for item in content["annotations"]}) == 3


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"image_id": 8}, "for image 8, which the set does not have"),
        ({"category_id": 1}, "of category 1, and the set has 3, 18, 90"),
        ({"bbox": [1, 2, 3]}, "numbers are needed"),
        ({"bbox": "none"}, "prediction 1 is not"),
        ({"score": float("nan")}, "numbers are needed"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, remedy):
    rows = as_predictions(two_images())
    rows[1] |= change
    with pytest.raises(ValueError, match=remedy):
        score_detections(two_images(), rows, NAMES, CATEGORY_IDS)


def test_a_file_of_something_else_is_refused():
    with pytest.raises(ValueError, match="this is no list"):
        check_predictions({"images": []}, {1}, CATEGORY_IDS)


def test_without_pycocotools_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'mixmae\[dense\]'"):
        require_pycocotools()
