"""Ridge regression in closed form against a fit without each image."""

import pytest
import torch
from torch.nn import functional as F

from mixmae.probing.ridge import ridge_leave_one_out
from tests.factories import clouds


@pytest.mark.parametrize(("num_images", "width"), [(30, 6), (12, 40)], ids=["long", "wide"])
def test_the_closed_form_is_that_of_fits_without_each_image(num_images, width):
    features, labels = clouds(num_images, width, 2.0)
    scaled = features.double()
    scaled = (scaled - scaled.mean(dim=0)) / (scaled.var(dim=0, unbiased=False) + 1e-6).sqrt()
    right = []
    for left_out in range(num_images):
        kept = torch.arange(num_images) != left_out
        x, y = scaled[kept], F.one_hot(labels[kept], 3).double()
        centre, offset = x.mean(dim=0), y.mean(dim=0)
        inner = (x - centre).T @ (x - centre) + 0.1 * num_images * torch.eye(width).double()
        weight = torch.linalg.solve(inner, (x - centre).T @ (y - offset))
        scores = (scaled[left_out] - centre) @ weight + offset
        right.append(bool(scores.argmax() == labels[left_out]))
    expected = sum(right) / num_images
    assert 0.2 < expected < 1
    assert ridge_leave_one_out(features, labels, num_classes=3).top[1] == pytest.approx(expected)
