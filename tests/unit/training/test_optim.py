"""Parameter groups and the scaling rule."""

import pytest
import torch
from torch import nn

from mixmae.training.optim import OptimConfig, build_optimizer, parameter_groups


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_biases_and_norms_are_not_decayed():
    decayed, undecayed = parameter_groups(_Module(), 0.05)
    assert (decayed["names"], decayed["weight_decay"]) == (["token", "linear.weight"], 0.05)
    assert (undecayed["names"], undecayed["weight_decay"]) == (["linear.bias", "norm.weight", "norm.bias"], 0.0)


def test_the_optimiser_decays_what_it_should():
    module = _Module()
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.linear.weight, torch.full((4, 3), 0.95))  # 1 - lr x decay
    torch.testing.assert_close(module.norm.weight, torch.ones(4))


def test_peak_rate_scales_with_the_batch():
    assert OptimConfig(base_lr=1.5e-4).peak_lr(1024) == pytest.approx(6e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("base_lr", 0.0), ("weight_decay", -1.0), ("betas", (0.9, 1.0)), ("clip_grad_norm", 0.0)]
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
