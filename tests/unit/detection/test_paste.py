"""A mask lands where its box is."""

import numpy as np
import pytest
import torch

from mixmae.detection.paste import paste_mask


def test_a_full_mask_fills_its_box():
    pasted = paste_mask(torch.ones(28, 28), torch.tensor([3.0, 2.0, 23.0, 12.0]), (20, 30))
    assert pasted.shape == (20, 30)
    inside = np.zeros((20, 30), dtype=bool)
    inside[2:12, 3:23] = True
    assert (pasted == inside).all()


def test_half_a_mask_fills_half():
    mask = torch.zeros(28, 28)
    mask[:, 14:] = 1
    pasted = paste_mask(mask, torch.tensor([0.0, 0.0, 20.0, 10.0]), (10, 20))
    assert not pasted[:, :10].any()
    assert pasted[:, 10:].all()


@pytest.mark.parametrize("box", [(-10.0, -10.0, 5.0, 5.0), (25.0, 15.0, 50.0, 50.0)])
def test_what_lies_outside_is_cut(box):
    pasted = paste_mask(torch.ones(28, 28), torch.tensor(box), (20, 30))
    assert pasted.sum() == (25 if box[0] < 0 else 5 * 5)


@pytest.mark.parametrize("box", [(5.0, 5.0, 5.0, 9.0), (40.0, 5.0, 50.0, 9.0), (5.0, 5.0, 4.0, 9.0)])
def test_a_box_without_pixels(box):
    assert not paste_mask(torch.ones(28, 28), torch.tensor(box), (20, 30)).any()
