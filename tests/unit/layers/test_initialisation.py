"""Limits of the initial weights; tests/unit/encoders/test_swin.py has those of linear layers in place."""

import pytest
import torch
from torch import nn

from mixmae.layers.initialisation import init_projections


@pytest.mark.parametrize(
    ("make", "fan_in", "fan_out"),
    [
        (lambda: nn.Linear(64, 192), 64, 192),
        (lambda: nn.Conv2d(8, 64, 2, stride=2), 8 * 4, 64),
        (lambda: nn.Conv2d(256, 256, 3, padding=1, groups=256), 9, 9),
    ],
    ids=["linear", "patches", "depthwise"],
)
def test_weights_fill_their_limit(make, fan_in, fan_out):
    torch.manual_seed(0)
    module = make()
    init_projections(module)
    limit = (6 / (fan_in + fan_out)) ** 0.5
    assert limit * 0.99 < module.weight.abs().max() <= limit
    assert module.bias.abs().max() == 0
