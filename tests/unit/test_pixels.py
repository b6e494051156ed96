"""Normalised pixels by hand."""

import pytest
import torch

from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD, fit_normalisation, normalise, usual_normalisation


@pytest.mark.parametrize("as_tensors", [False, True])
def test_values(as_tensors):
    images = torch.tensor([51, 102], dtype=torch.uint8)[None, :, None, None].expand(3, 2, 4, 5)
    mean, std = (0.1, 0.5), (0.5, 0.2)
    if as_tensors:
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    expected = torch.tensor([0.2, -0.5])[None, :, None, None].expand(3, 2, 4, 5)
    torch.testing.assert_close(normalise(images, mean=mean, std=std), expected)


def test_the_usual_values_have_one_per_channel():
    assert usual_normalisation(3) == (IMAGENET_MEAN, IMAGENET_STD)
    for channels in (1, 2, 4, 5, 13):
        mean, std = usual_normalisation(channels)
        assert len(mean) == len(std) == channels
        assert (mean, std) == ((0.5,) * channels,) * 2 or channels in (1, 4)
    assert usual_normalisation(4) == ((*IMAGENET_MEAN, 0.5), (*IMAGENET_STD, 0.5))
    # The luminance of the mean colour.
    assert usual_normalisation(1)[0][0] == pytest.approx(0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406, abs=5e-4)


def test_normalisation_follows_the_channels():
    assert fit_normalisation((0.1, 0.2), (0.3, 0.4), 2) == ((0.1, 0.2), (0.3, 0.4))
    assert fit_normalisation((0.4,) * 3, (0.2,) * 3, 1) == ((0.4,), (0.2,))
    assert fit_normalisation((0.1, 0.2, 0.3), (0.2,) * 3, 1) == usual_normalisation(1)
    assert fit_normalisation(IMAGENET_MEAN, IMAGENET_STD, 13) == ((0.5,) * 13,) * 2
