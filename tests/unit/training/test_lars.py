"""LARS by hand, and as SGD where the trust ratio is 1."""

import copy

import pytest
import torch
from torch import nn

from mixmae.training.lars import Lars
from tests.factories import seeded


def with_grad(values, grad):
    parameter = nn.Parameter(torch.tensor(values))
    parameter.grad = torch.tensor(grad)
    return parameter


def test_two_steps_by_hand():
    weight, bias = with_grad([[3.0, 4.0]], [[0.0, 1.5]]), with_grad([1.0], [2.0])
    optimizer = Lars([weight, bias], lr=0.5, weight_decay=0.5, momentum=0.9, trust_coefficient=0.1)
    optimizer.step()
    # u = (0, 1.5) + 0.5 (3, 4) = (1.5, 3.5); |w| = 5, |u| = sqrt(14.5); v = 0.1 * 5 / sqrt(14.5) u
    velocity = 0.5 / 14.5**0.5 * torch.tensor([[1.5, 3.5]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.5 * velocity
    torch.testing.assert_close(weight.data, expected)
    assert bias.item() == 0.0  # 1 - 0.5 * 2: neither decay nor ratio
    weight.grad.zero_()
    bias.grad.zero_()
    optimizer.step()
    # u = 0.5 w now, so the ratio is 0.1 / 0.5 whatever w is: v = 0.9 v + 0.1 w
    torch.testing.assert_close(weight.data, expected - 0.5 * (0.9 * velocity + 0.1 * expected))
    assert bias.item() == pytest.approx(-0.9)


def test_it_is_sgd_with_momentum_where_the_ratio_is_one():
    start = torch.randn(4, 3, generator=seeded())
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lars = Lars([ours], lr=0.3, momentum=0.8, trust_coefficient=0.01)
    sgd = torch.optim.SGD([theirs], lr=0.3, momentum=0.8)
    for step in range(5):
        direction = torch.randn(4, 3, generator=seeded(step + 1))
        ours.grad = direction / direction.norm() * 0.01 * ours.detach().norm()
        theirs.grad = ours.grad.clone()
        lars.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, start)


@pytest.mark.parametrize(("weight", "grad"), [([[0.0]], [[2.0]]), ([[2.0]], [[0.0]])])
def test_zero_norms_have_a_ratio_of_one(weight, grad):
    parameter = with_grad(weight, grad)
    Lars([parameter], lr=0.25).step()
    assert parameter.item() == weight[0][0] - 0.25 * grad[0][0]


def test_it_resumes():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = Lars([weight], lr=0.1, trust_coefficient=1.0)
    weight.grad = torch.randn(3, 3)
    optimizer.step()
    copied = nn.Parameter(weight.detach().clone())
    resumed = Lars([copied], lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight.grad = torch.randn(3, 3)
    copied.grad = weight.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(weight, copied)
