"""Losses of a drawing."""

import math

import pytest
import torch

from mixmae.detection.losses import mask_loss, mask_targets, proposal_recall
from mixmae.objects import Target


def striped():
    """Two objects: the left and the right half of a canvas of 32 px."""
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :, :16], masks[1, :, 16:] = True, True
    boxes = torch.tensor([[0.0, 0.0, 16.0, 32.0], [16.0, 0.0, 32.0, 32.0]])
    return Target(boxes, torch.tensor([0, 1]), masks, (32, 32))


def test_a_region_shows_the_part_of_its_object():
    whole = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(2, 1)
    left, right = mask_targets(striped(), whole, torch.tensor([0, 1]), 8)
    assert left[:, :4].min() == 1
    assert left[:, 4:].max() == 0
    assert torch.equal(right, 1 - left)
    (quarter,) = mask_targets(striped(), torch.tensor([[12.0, 0.0, 20.0, 8.0]]), torch.tensor([0]), 8)
    assert quarter[:, :4].min() == 1
    assert quarter[:, 4:].max() == 0


def test_a_point_belongs_to_an_object_that_covers_half_of_it():
    """Points of 4 x 4 px; the object ends after 13 px, and after 14 px."""
    for left, covered in ((3.0, 3), (2.0, 4)):
        (seen,) = mask_targets(striped(), torch.tensor([[left, 0.0, left + 32, 32.0]]), torch.tensor([0]), 8)
        assert seen[0].sum() == covered


def test_masks_are_judged_in_the_channel_of_their_class():
    target = striped()
    logits = torch.zeros(2, 3, 8, 8)
    logits[0, 1], logits[1, 2] = 20.0, 20.0  # right where the region is the object's box
    loss = mask_loss(logits, [target.boxes], [torch.tensor([0, 1])], [target])
    assert loss < 1e-6
    assert mask_loss(logits.flip(1), [target.boxes], [torch.tensor([0, 1])], [target]) > 0.3
    nothing = mask_loss(torch.zeros(2, 3, 8, 8), [target.boxes], [torch.tensor([0, 1])], [target])
    assert nothing.item() == pytest.approx(math.log(2))


def test_recall_by_hand():
    target = striped()
    assert proposal_recall([target.boxes], [target]) == 1
    half = torch.tensor([[0.0, 0.0, 16.0, 16.0]])  # overlaps the first object by exactly a half
    assert proposal_recall([half], [target]) == 0.5
    assert proposal_recall([half - 1], [target]) == 0
    empty = Target(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 32, 32, dtype=torch.bool), (32, 32)
    )
    assert proposal_recall([half, half], [empty, target]) == 0.5
    assert proposal_recall([half], [empty]) == 1
    assert proposal_recall([half[:0]], [target]) == 0
