"""mIoU and its relatives on a drawing small enough to count by hand."""

import math

import pytest
import torch

from mixmae.segmentation.scores import count_pixels, pixel_scores
from mixmae.segmentation.step import IGNORE

TRUTH = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [IGNORE, IGNORE, 2, 2]], dtype=torch.uint8)
PREDICTED = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [0, 1, 2, 0]], dtype=torch.uint8)


def test_by_hand():
    confusion = count_pixels(PREDICTED, TRUTH, 4)
    assert confusion.tolist() == [[3, 1, 1, 0], [0, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    scores = pixel_scores(confusion)
    assert scores.iou[:3].tolist() == [3 / 6, 3 / 4, 1 / 3]
    assert math.isnan(scores.iou[3])  # in no truth and no prediction: no figure, and no part of the mean
    assert scores.miou == pytest.approx((1 / 2 + 3 / 4 + 1 / 3) / 3)
    assert scores.accuracy[:3].tolist() == [3 / 5, 1, 1 / 2]
    assert scores.macc == pytest.approx((3 / 5 + 1 + 1 / 2) / 3)
    assert scores.aacc == 7 / 10
    assert scores.pixels.tolist() == [5, 3, 2, 0]


def test_a_class_that_is_only_predicted_counts_as_missed():
    scores = pixel_scores(count_pixels(torch.tensor([0, 3]), torch.tensor([0, 0]), 4))
    assert scores.miou == pytest.approx((0.5 + 0) / 2)
    assert scores.macc == 0.5


def test_the_set_is_scored_and_not_the_images():
    """Two images, the second small and all wrong: a mean over images would be 0.5."""
    parts = [(torch.zeros(99), torch.zeros(99)), (torch.ones(1), torch.zeros(1))]
    whole = sum(count_pixels(predicted, truth, 2) for predicted, truth in parts)
    assert pixel_scores(whole).iou[0] == 0.99


def test_nothing_to_score():
    with pytest.raises(ValueError, match="no pixel has a class"):
        pixel_scores(torch.zeros(2, 2, dtype=torch.int64))
