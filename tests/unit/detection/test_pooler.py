"""Regions are read where they are, from the level that fits them."""

import pytest
import torch

from mixmae.detection.pooler import pool_regions, region_levels


@pytest.mark.parametrize(("side", "level"), [(10, 0), (111, 0), (113, 1), (224, 2), (447, 2), (449, 3), (5000, 3)])
def test_level_by_size(side, level):
    boxes = torch.tensor([[7.0, 9.0, 7.0 + side, 9.0 + side]])
    assert region_levels(boxes, (4, 8, 16, 32)).tolist() == [level]
    assert region_levels(boxes, (8, 16, 32)).tolist() == [max(0, level - 1)]


def bilinear(feature, y, x):
    """The value of (H, W) at a point, where the first pixel's centre is at 0.5."""
    y, x = (min(max(value - 0.5, 0), side - 1) for value, side in ((y, feature.shape[0]), (x, feature.shape[1])))
    top, left = int(y), int(x)
    bottom, right = min(top + 1, feature.shape[0] - 1), min(left + 1, feature.shape[1] - 1)
    rows = [(1 - x + left) * feature[row, left] + (x - left) * feature[row, right] for row in (top, bottom)]
    return (1 - y + top) * rows[0] + (y - top) * rows[1]


def test_against_bilinear_reading():
    """One sample per cell: a region of as many points as the grid has cells."""
    feature = torch.randn(1, 1, 12, 16, generator=torch.Generator().manual_seed(0))
    x0, y0, side, stride = 10.0, 5.0, 28.0, 4
    pooled = pool_regions([feature], [torch.tensor([[x0, y0, x0 + side, y0 + side]])], (stride,), 7)
    cell = side / stride / 7
    for row in range(7):
        for column in range(7):
            y, x = y0 / stride + (row + 0.5) * cell, x0 / stride + (column + 0.5) * cell
            assert pooled[0, 0, row, column].item() == pytest.approx(bilinear(feature[0, 0], y, x).item(), abs=1e-4)


def test_each_region_reads_its_image_and_its_level():
    levels = [torch.full((2, 3, side, side), float(side)) for side in (64, 32)]
    for level in levels:
        level[1] += 0.5
    small, large = [8.0, 8.0, 28.0, 28.0], [8.0, 8.0, 200.0, 220.0]
    pooled = pool_regions(levels, [torch.tensor([large, small]), torch.tensor([small])], (4, 8), 7)
    expected = torch.tensor([32.0, 64.0, 64.5])[:, None, None, None].expand_as(pooled)
    torch.testing.assert_close(pooled, expected)


def test_scales_do_not_depend_on_what_came_before():
    """The first batch may be small pictures on a large canvas: the next one is read as if it had not been."""
    feature = [torch.randn(1, 2, 32, 32), torch.randn(1, 2, 16, 16)]
    boxes = [torch.tensor([[3.0, 4.0, 90.0, 60.0]])]
    before = pool_regions(feature, boxes, (4, 8), 7)
    pool_regions([torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)], [torch.tensor([[0.0, 0.0, 3.0, 3.0]])], (4, 8), 7)
    assert torch.equal(pool_regions(feature, boxes, (4, 8), 7), before)


def test_no_regions_at_all():
    feature = [torch.randn(2, 4, 8, 8, requires_grad=True)]
    pooled = pool_regions(feature, [torch.zeros(0, 4), torch.zeros(0, 4)], (4,), 7)
    assert pooled.shape == (0, 4, 7, 7)
    pooled.sum().backward()
    assert feature[0].grad.abs().sum() == 0
