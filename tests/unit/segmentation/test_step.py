"""The loss of segmentation, by hand."""

import math

import pytest
import torch
from torch import nn

from mixmae.segmentation.step import IGNORE, segmentation_step, unpack_targets


class Fixed(nn.Module):
    """Scores that are given, and an auxiliary head that finds all classes equally likely."""

    def __init__(self, scores, has_auxiliary=True):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.has_auxiliary = has_auxiliary

    def forward(self, images, with_auxiliary=False):
        return self.scores, 0 * self.scores if self.has_auxiliary else None


def _scores():
    """(1, 2, 2, 2): log-odds of class 1 of 2 over class 0 at four pixels."""
    return torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [2.0, 0.5]])])[None]


def test_by_hand():
    """Pixels of class 1, 0, ignored, 1: -log sigmoid(1), -log sigmoid(1), nothing, -log sigmoid(0.5)."""
    targets = torch.tensor([[[1, 0], [IGNORE, 1]]])
    output = segmentation_step(Fixed(_scores()), torch.zeros(1), targets, aux_weight=0.4)
    main = (2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5))) / 3
    assert output.metrics["loss_main"].item() == pytest.approx(main)
    assert output.metrics["loss_aux"].item() == pytest.approx(math.log(2))
    assert output.loss.item() == pytest.approx(main + 0.4 * math.log(2))
    assert output.metrics["pixel_accuracy"] == 1


def test_ignored_pixels_get_no_gradient():
    model = Fixed(_scores(), has_auxiliary=False)
    segmentation_step(model, torch.zeros(1), torch.tensor([[[1, 0], [IGNORE, 1]]]), aux_weight=0.4).loss.backward()
    assert model.scores.grad[0, :, 1, 0].abs().max() == 0
    assert (model.scores.grad.abs().sum(dim=1) > 0).sum() == 3


def test_nothing_to_learn():
    model = Fixed(_scores())
    output = segmentation_step(model, torch.zeros(1), torch.full((1, 2, 2), IGNORE), aux_weight=0.4)
    output.loss.backward()
    assert output.loss == 0
    assert model.scores.grad.abs().max() == 0


def test_a_batch_may_be_cut_anywhere():
    """One image has three pixels that count, the other one: apart their mean loss is that of both together."""
    parts = [torch.tensor([[[1, 0], [IGNORE, 1]]]), torch.tensor([[[IGNORE, 1], [IGNORE, IGNORE]]])]
    together = segmentation_step(Fixed(_scores().repeat(2, 1, 1, 1)), torch.zeros(1), torch.cat(parts), aux_weight=0.4)
    apart = [segmentation_step(Fixed(_scores()), torch.zeros(1), part, aux_weight=0.4) for part in parts]
    assert (apart[0].loss + apart[1].loss).item() / 2 == pytest.approx(together.loss.item())
    assert together.metrics["pixel_accuracy"] == 0.5  # of the second image the only pixel is wrong


def test_scores_are_resized_to_the_targets():
    targets = torch.ones(1, 8, 8, dtype=torch.int64)
    output = segmentation_step(Fixed(_scores(), has_auxiliary=False), torch.zeros(1), targets, aux_weight=0.0)
    expected = torch.nn.functional.interpolate(_scores(), size=(8, 8), mode="bilinear")
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(expected, targets).item())


def test_targets_are_unpacked():
    packed = (torch.tensor([0, 1, 2, 3, 4, 255], dtype=torch.uint8), torch.arange(6, dtype=torch.uint8))
    unpacked = unpack_targets(packed, (2, 3))
    assert unpacked.dtype == torch.int64
    assert unpacked.tolist() == [[[0, 1, 2], [3, 4, 255]], [[0, 1, 2], [3, 4, 5]]]
