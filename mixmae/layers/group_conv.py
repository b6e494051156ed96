"""Convolution and pooling whose windows reach over cells of several images, kept inside the output's own group.

The mixed partial convolution of paper section A.3: an output reads only the inputs of its own group, as if the others
were not there. A dense one is a gather and a matrix product, a depthwise one a sum over the offsets of its kernel. Both
cost as many multiply-accumulates as the plain convolution, whatever the number of groups; the gather takes kernel**2
times the memory of its input, the sum does not.

Legend: B samples, M group maps (B or 1), C channels, H W the input grid, h w the output grid, n = rows * columns of a
kernel, S stride. Padding counts as the output's own group, with value zero, as in a padded convolution, so a single
group changes nothing.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTSIDE = -1
"""The group of padding while neighbours are compared; no image has it."""


def group_conv2d(x: Tensor, conv: nn.Conv2d, groups: Tensor | None, *, weight: Tensor | None = None) -> Tensor:
    """Convolve each output from the inputs of its own group.

    The result is scaled by the share of the kernel that was read, n / (inputs of the group), before the bias is added.

    Args:
        x: (B, C, H, W) float.
        conv: of any kernel, stride and zero padding, undilated, dense or depthwise; with a stride, the output's group
            is that of the first input of its block, so a block must not straddle groups.
        groups: (M, H, W) int64, the group of each input; None = the plain convolution.
        weight: used instead of conv.weight, for standardised filters.
    Returns: (B, out_channels, h, w).
    Raises: ValueError for a convolution in groups of channels that is not depthwise, a dilated one, or groups of
        another size than x.
    Source: paper section A.3; the scale is that of partial convolution (Liu et al. 2018). The paper's figure of the
        mixed version does not show whether it keeps the scale.
    """
    weight = conv.weight if weight is None else weight
    if groups is None:
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if (conv.groups != 1 and not depthwise) or conv.dilation != (1, 1):
        raise ValueError("a convolution by groups must be dense or depthwise and not dilated")
    assert not isinstance(conv.padding, str), "the encoders give their paddings as numbers"
    batch, channels = x.shape[:2]
    kernel, stride, padding = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.padding)
    own, size = same_group(groups, x, kernel, stride, padding)  # (M, n, h*w)
    # The weight of each input in an output; an output always reads the centre of its window.
    share = own * (own.shape[1] / own.sum(dim=1, keepdim=True).to(x.dtype))  # (M, n, h*w)
    if depthwise:
        out = _sum_of_shifts(x, weight.flatten(1), share.unflatten(2, size), kernel, stride, padding)
    else:
        read = F.unfold(x, kernel, padding=padding, stride=stride)
        read = read.view(batch, channels, own.shape[1], -1) * share[:, None]  # (B, C, n, h*w)
        out = torch.matmul(weight.flatten(1), read.flatten(1, 2)).view(batch, -1, *size)
    if conv.bias is not None:
        out = out + conv.bias[:, None, None]
    return out


def _sum_of_shifts(
    x: Tensor,
    weight: Tensor,
    share: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Convolve each channel by itself: add up, for each offset in the kernel, the shifted input times weight and share.

    Args: x: (B, C, H, W).  weight: (C, n).  share: (M, n, h, w).   Returns: (B, C, h, w).
    """
    down, across = share.shape[2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    out = x.new_zeros(())
    for index, (row, column) in enumerate(product(range(kernel[0]), range(kernel[1]))):
        rows = slice(row, row + stride[0] * (down - 1) + 1, stride[0])
        columns = slice(column, column + stride[1] * (across - 1) + 1, stride[1])
        out = torch.addcmul(out, padded[:, :, rows, columns], share[:, index, None] * weight[:, index, None, None])
    return out


def group_max_pool2d(x: Tensor, pool: nn.MaxPool2d, groups: Tensor | None) -> Tensor:
    """Take each output's maximum over the inputs of its own group; padding never wins.

    Args: x: (B, C, H, W) float.  pool: with int kernel, stride and padding.  groups: (M, H, W) int64, or None.
    Returns: (B, C, h, w).   Raises: ValueError for groups of another size than x.
    """
    if groups is None:
        return pool(x)
    kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
    own, size = same_group(groups, x, kernel, stride, padding, outside_counts=False)
    # Padding is of no group, so the zeros that unfold puts there cannot win.
    read = F.unfold(x, kernel, padding=padding, stride=stride).view(*x.shape[:2], own.shape[1], -1)
    return read.masked_fill(~own[:, None], float("-inf")).amax(dim=2).view(*x.shape[:2], *size)


def same_group(
    groups: Tensor,
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    outside_counts: bool = True,
) -> tuple[Tensor, tuple[int, int]]:
    """Find the inputs of each output's window that belong to the output's own group.

    Args: groups: (M, H, W) int64.  x: (B, C, H, W).  outside_counts: whether padding counts as the own group.
    Returns: (M, n, h*w) bool, True = own group, and (h, w).   Raises: ValueError if groups has another grid than x.
    """
    if groups.ndim != 3 or groups.shape[1:] != x.shape[2:]:
        raise ValueError(f"a group map of shape {tuple(groups.shape)} does not fit a grid of {tuple(x.shape[2:])}")
    padded = F.pad(groups, (padding[1], padding[1], padding[0], padding[0]), value=OUTSIDE)
    # unfold gathers floats only; group numbers are small, so float is exact.
    read = F.unfold(padded[:, None].float(), kernel, stride=stride)  # (M, n, h*w)
    centre = groups[:, :: stride[0], :: stride[1]]
    own = read == centre.flatten(1)[:, None]
    if outside_counts:
        own |= read == OUTSIDE
    return own, (centre.shape[1], centre.shape[2])


def _pair(sides: int | tuple[int, ...]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
