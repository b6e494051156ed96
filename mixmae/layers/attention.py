"""Attention of queries to keys, by the quickest way that there is for the device and for what needs a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What a GPU may train with under a mask without a gradient. Not cuDNN, whose gradients were NaN where all scores of a
row were low (an H200, torch 2.11, cuDNN 9.19; pytorch #196678)."""


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is computed with on a CPU. mixmae.cost asks here what would be done on a GPU."""
    return tensor.device.type == "cpu"


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(query key^T / sqrt(D) + bias) value.

    Torch's fused kernels do it, but on a CPU none of them gives a bias its gradient: torch then goes through the scores
    many times, among others to look for rows without any key. There it is done by hand, in three passes.

    Args:
        query, key, value: (B, N, T, D).
        bias: broadcasts to (B, N, T, T). Float, added to the scores, minus infinity where a query may not read a key
            (every query may read one at least); or bool, True = may read; None = all may.
    Returns: (B, N, T, D).
    """
    if bias is not None and torch.is_grad_enabled():
        if on_cpu(query) and bias.requires_grad:
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            scores += bias  # in place: no gradient needs the scores
            return scores.softmax(dim=-1) @ value
        if not on_cpu(query) and not bias.requires_grad:
            with sdpa_kernel(_MASKED_KERNELS):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
