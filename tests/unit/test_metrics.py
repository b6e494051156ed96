"""Metrics on drawings small enough to count by hand."""

import math

import pytest
import torch

from mixmae.metrics import calibration, confusion_matrix, label_ranks, per_class_accuracy, top_k_accuracy

# Six images, three classes. Predicted: 0, 1, 1, 2, 0 and 2 (the last one is not judged).
LOGITS = torch.tensor(
    [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 3.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [0.0, 0.0, 9.0]]
)
LABELS = torch.tensor([0, 1, 0, 0, 1, -1])  # places among the logits: 1st, 1st, 2nd, 3rd, 3rd


def test_top_k():
    accuracy = top_k_accuracy(LOGITS, LABELS, ks=(1, 2, 5))
    assert accuracy.top == pytest.approx({1: 2 / 5, 2: 3 / 5, 5: 1.0})
    assert (accuracy.num_judged, accuracy.num_unknown) == (5, 1)


def test_equal_logits_are_taken_in_the_order_of_classes():
    """A model that says nothing is right as often as a guess, not always."""
    assert label_ranks(torch.zeros(4, 4), torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert top_k_accuracy(torch.zeros(4, 4), torch.arange(4), ks=(1,)).top[1] == 0.25


def test_per_class():
    table = per_class_accuracy(LOGITS, LABELS)
    assert table.counts.tolist() == [3, 2, 0]
    assert table.top1.tolist()[:2] == pytest.approx([1 / 3, 1 / 2])
    assert table.top5.tolist()[:2] == [1.0, 1.0]
    assert math.isnan(table.top1[2])
    assert table.num_unknown == 1
    six = torch.arange(6.0).expand(2, 6)  # class 0 is the last of six, class 1 the fifth
    assert per_class_accuracy(six, torch.tensor([0, 1])).top5.tolist()[:2] == [0.0, 1.0]


def test_confusion():
    matrix = confusion_matrix(LOGITS, LABELS)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_calibration():
    """Two classes, confidences 0.6 (right), 0.6 (wrong), 0.9 (right), 0.95 (right); four bins of a quarter."""
    confidence = torch.tensor([0.6, 0.6, 0.9, 0.95, 0.7], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    found = calibration(logits, torch.tensor([0, 1, 0, 0, -1]), num_bins=4)
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.counts.tolist() == [0, 0, 2, 2]
    assert found.confidence[2:].tolist() == pytest.approx([0.6, 0.925])
    assert found.accuracy[2:].tolist() == pytest.approx([0.5, 1.0])
    assert found.confidence[:2].isnan().all()
    assert found.expected_error == pytest.approx(2 / 4 * 0.1 + 2 / 4 * 0.075)
    assert found.num_unknown == 1


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    found = calibration(torch.zeros(3, 2), torch.tensor([0, 0, 1]), num_bins=2)  # confidence 1/2, twice right
    assert found.counts.tolist() == [3, 0]
    assert found.expected_error == pytest.approx(2 / 3 - 1 / 2)
    sure = calibration(torch.tensor([[0.0, 1e4]]), torch.tensor([1]))
    assert sure.counts.tolist() == [0] * 14 + [1]
    assert sure.expected_error == 0


@pytest.mark.parametrize("metric", [top_k_accuracy, per_class_accuracy, confusion_matrix, calibration])
@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (LOGITS, torch.full((6,), -1), "none of 6 images has a class"),
        (LOGITS, torch.tensor([0, 1, 2, 3, 0, 0]), "from 0 to 3, but the model knows classes 0 to 2"),
        (LOGITS, torch.tensor([0, 1, 2, -2, 0, 0]), "from -2 to 2"),
        (LOGITS * float("nan"), LABELS, "not numbers"),
        (LOGITS, LABELS[:5], r"got \(6, 3\)"),
        (LOGITS, LABELS.float(), "float32"),
    ],
)
def test_what_cannot_be_judged(metric, logits, labels, words):
    with pytest.raises(ValueError, match=words):
        metric(logits, labels)
