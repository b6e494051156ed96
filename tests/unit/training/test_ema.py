"""The running average by hand."""

import contextlib

import pytest
from torch import nn

from mixmae.training.ema import WeightAverage


def layer(value: float) -> nn.Linear:
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, 0.0)
    return module


def average_of(average: WeightAverage, module: nn.Linear) -> float:
    with average.applied_to(module):
        return module.weight.item()


def test_warm_start_then_decay():
    module = layer(0.0)
    average = WeightAverage(module, decay=0.15)
    nn.init.constant_(module.weight, 1.0)
    average.update(module)
    assert average_of(average, module) == pytest.approx(0.9)  # d = 1/10
    nn.init.constant_(module.weight, 2.0)
    average.update(module)
    assert average_of(average, module) == pytest.approx(0.15 * 0.9 + 0.85 * 2)  # 2/11 is above 0.15 already
    assert module.weight.item() == 2.0  # and has its own weights back


def test_weights_come_back_after_an_error():
    module = layer(0.0)
    average = WeightAverage(module)
    nn.init.constant_(module.weight, 1.0)
    with contextlib.suppress(RuntimeError), average.applied_to(module):
        assert module.weight.item() == 0.0
        raise RuntimeError
    assert module.weight.item() == 1.0


def test_it_resumes():
    module = layer(0.0)
    whole = WeightAverage(module, decay=0.5)
    for step in range(6):
        nn.init.constant_(module.weight, float(step))
        if step == 3:
            resumed = WeightAverage(layer(9.0), decay=0.5)
            resumed.load_state_dict(whole.state_dict())
        whole.update(module)
        if step >= 3:
            resumed.update(module)
    assert average_of(whole, module) == average_of(resumed, module)


def test_frozen_weights_are_not_kept():
    module = layer(1.0)
    module.bias.requires_grad_(False)
    assert list(WeightAverage(module).state_dict()["averages"]) == ["weight"]


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="decay is 1"):
        WeightAverage(layer(0.0), decay=1.0)
    with pytest.raises(ValueError, match="another model"):
        WeightAverage(layer(0.0)).load_state_dict(WeightAverage(nn.Linear(2, 1)).state_dict())
