"""Attention by hand, as it is on a CPU where a bias needs a gradient, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from mixmae.layers.attention import attend


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_torchs_attention(masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64, requires_grad=True).unbind(0)
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    hidden = torch.randint(0, 2, (9, 9)).bool() & ~torch.eye(9, dtype=torch.bool)
    added = bias.masked_fill(hidden, float("-inf")) if masked else bias
    found, expected = attend(query, key, value, added), F.scaled_dot_product_attention(query, key, value, added)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(found)
    inputs = (query, key, value, bias)
    for one, two in zip(
        torch.autograd.grad((found * weight).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_the_bias_is_left_as_it_was():
    """The scores are added to in place; what is added is not."""
    bias = torch.zeros(1, 1, 2, 2, requires_grad=True)
    kept = bias + 0
    attend(*torch.ones(3, 1, 1, 2, 4).unbind(0), kept)
    assert not kept.any()
