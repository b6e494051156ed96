"""The arithmetic of boxes against values worked out by hand."""

import math

import pytest
import torch

from mixmae.detection.boxes import (
    BACKGROUND,
    BETWEEN,
    ROI_WEIGHTS,
    RPN_WEIGHTS,
    decode_boxes,
    encode_boxes,
    level_anchors,
    match,
    sample,
)


def test_anchors_lie_around_the_points():
    anchors = level_anchors(32, (1.0, 4.0), (2, 3), stride=16).view(2, 3, 2, 4)
    assert anchors[0, 0].tolist() == [[-16, -16, 16, 16], [-8, -32, 8, 32]]  # a ratio of 4: twice as high, half as wide
    assert anchors[1, 2, 0].tolist() == [2 * 16 - 16, 16 - 16, 2 * 16 + 16, 16 + 16]


def test_offsets_by_hand():
    anchor, box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 20.0]])
    # centre 5, 10 -> 15, 10; width 10 -> 20; height unchanged
    assert encode_boxes(box, anchor, RPN_WEIGHTS).tolist() == [pytest.approx([1.0, 0.0, math.log(2), 0.0])]
    assert encode_boxes(box, anchor, ROI_WEIGHTS).tolist() == [pytest.approx([10.0, 0.0, 5 * math.log(2), 0.0])]
    assert decode_boxes(torch.zeros(1, 4), anchor, ROI_WEIGHTS).tolist() == anchor.tolist()


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    corners = 500 * torch.rand(2, 50, 2, generator=generator)
    boxes, anchors = torch.cat([corners, corners + 5 + 200 * torch.rand(2, 50, 2, generator=generator)], dim=-1)
    for weights in (RPN_WEIGHTS, ROI_WEIGHTS):
        torch.testing.assert_close(
            decode_boxes(encode_boxes(boxes, anchors, weights), anchors, weights), boxes, rtol=1e-4, atol=1e-3
        )


def test_a_wild_offset_stays_finite():
    wild = decode_boxes(torch.tensor([[0.0, 0.0, 1000.0, 1000.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), RPN_WEIGHTS)
    assert wild[0, 2] - wild[0, 0] == pytest.approx(1000, rel=1e-4)


def test_boxes_are_float32_under_autocast():
    """bfloat16 has a step of 4 px at 900 px: the same offsets must still give the same box to half a pixel."""
    anchors = torch.tensor([[900.0 - 128, 900.0 - 128, 900.0 + 128, 900.0 + 128]]).repeat(200, 1)
    offsets = 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    exact = decode_boxes(offsets, anchors, RPN_WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decode_boxes(offsets.bfloat16(), anchors, RPN_WEIGHTS)
    assert rounded.dtype == torch.float32
    boxes, coarse = (exact.bfloat16(), anchors.bfloat16())
    assert torch.equal(
        encode_boxes(boxes, coarse, RPN_WEIGHTS), encode_boxes(boxes.float(), coarse.float(), RPN_WEIGHTS)
    )
    assert (rounded - exact).abs().max() < 0.5


def test_matching_by_hand():
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # the first object
            [0.0, 0.0, 10.0, 5.0],  # half of it
            [0.0, 0.0, 10.0, 3.0],  # less
            [20.0, 0.0, 30.0, 2.0],  # a fifth of the second: its best
            [50.0, 0.0, 60.0, 9.0],  # nothing
        ]
    )
    assert match(boxes, objects, 0.4, 0.7).tolist() == [0, BETWEEN, BACKGROUND, BACKGROUND, BACKGROUND]
    assert match(boxes, objects, 0.4, 0.7, keep_best=True).tolist() == [0, BETWEEN, BACKGROUND, 1, BACKGROUND]
    assert match(boxes, objects[:0], 0.4, 0.7, keep_best=True).tolist() == [BACKGROUND] * 5
    far = torch.tensor([[90.0, 90.0, 99.0, 99.0]])
    assert match(boxes, far, 0.4, 0.7, keep_best=True).tolist() == [BACKGROUND] * 5  # nothing overlaps it


def test_samples_are_filled_up_with_background():
    matched = torch.tensor([0, 1, BETWEEN, BACKGROUND, 2, BACKGROUND, BETWEEN, BACKGROUND])
    draws = {tuple(map(len, sample(matched, 4, 0.5, torch.Generator().manual_seed(seed)))) for seed in range(5)}
    assert draws == {(2, 2)}
    positive, background = sample(matched, 100, 1.0, torch.Generator().manual_seed(0))
    assert sorted(positive.tolist()) == [0, 1, 4]
    assert sorted(background.tolist()) == [3, 5, 7]
    twice = [sample(matched, 4, 0.5, torch.Generator().manual_seed(1))[0].tolist() for _ in range(2)]
    assert twice[0] == twice[1]
