"""Normalised pixels by hand."""

import pytest
import torch

from mixmae.pixels import normalise


@pytest.mark.parametrize("as_tensors", [False, True])
def test_values(as_tensors):
    images = torch.tensor([51, 102], dtype=torch.uint8)[None, :, None, None].expand(3, 2, 4, 5)
    mean, std = (0.1, 0.5), (0.5, 0.2)
    if as_tensors:
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    expected = torch.tensor([0.2, -0.5])[None, :, None, None].expand(3, 2, 4, 5)
    torch.testing.assert_close(normalise(images, mean=mean, std=std), expected)
