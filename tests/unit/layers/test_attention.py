"""Attention by hand, as it is on a CPU where a bias needs a gradient, against torch's own; and a GPU's kernels."""

import pytest
import torch
from torch.nn import functional as F

from mixmae.layers import attention
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


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_gpu_trains_under_a_mask_without_cudnn(monkeypatch, learned, training):
    """Its gradients were NaN there. A bias with a gradient is nothing that cuDNN takes."""
    allowed, honest = [], F.scaled_dot_product_attention

    def fused(*tensors, attn_mask):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return honest(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(attention, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    bias = torch.zeros(1, 1, 4, 4, requires_grad=True) if learned else torch.ones(4, 4, dtype=torch.bool)
    with torch.set_grad_enabled(training):
        attend(*torch.ones(3, 1, 1, 4, 8).unbind(0), bias)
    assert allowed == [learned or not training]
