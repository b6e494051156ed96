"""Convolution by groups against its definition: blank the other groups, convolve, rescale, take one's own outputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixmae.layers.group_conv import group_conv2d, group_max_pool2d
from mixmae.mixing import draw_group_map, upsample_group_map
from tests.factories import seeded

CONVOLUTIONS = {
    "dense": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise-strided": lambda: nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6),
    "stem": lambda: nn.Conv2d(6, 4, 7, stride=4, padding=3),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
}


def definition(x, conv, group_map):
    """Group by group, with a plain convolution of each."""
    out = None
    for group in group_map.unique():
        own = (group_map == group)[:, None].float()
        part = F.conv2d(x * own, conv.weight, None, conv.stride, conv.padding, 1, conv.groups)
        ones = torch.ones(1, 1, *conv.kernel_size)
        outside = F.pad(torch.zeros_like(own), (conv.padding[1],) * 4, value=1.0)  # the border counts as read
        count = F.conv2d(F.pad(own, (conv.padding[1],) * 4) + outside, ones, stride=conv.stride)
        part = part * (ones.numel() / count.clamp(min=1))
        mine = own[:, :, :: conv.stride[0], :: conv.stride[1]].bool()
        out = torch.where(mine, part, torch.zeros_like(part) if out is None else out)
    return out if conv.bias is None else out + conv.bias[:, None, None]


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("num_maps", [1, 2])
def test_equals_the_definition(make, num_maps):
    torch.manual_seed(0)
    conv, x = make(), torch.randn(2, 6, 16, 24, generator=seeded())
    group_map = upsample_group_map(draw_group_map((4, 6), 3, seeded(), num_maps), (16, 24))
    torch.testing.assert_close(group_conv2d(x, conv, group_map), definition(x, conv, group_map), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group_conv2d(x, conv, torch.zeros_like(group_map)), conv(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group_conv2d(x, conv, None), conv(x))


def test_max_pool_by_groups():
    pool, x = nn.MaxPool2d(3, 2, 1), torch.randn(2, 5, 16, 24, generator=seeded()) - 5
    group_map = upsample_group_map(draw_group_map((4, 6), 3, seeded()), (16, 24))
    expected = torch.zeros(2, 5, 8, 12)
    for group in range(3):
        own = (group_map == group)[:, None]
        pooled = pool(x.masked_fill(~own, float("-inf")))
        expected = torch.where(own[..., ::2, ::2], pooled, expected)
    torch.testing.assert_close(group_max_pool2d(x, pool, group_map), expected)
    torch.testing.assert_close(group_max_pool2d(x, pool, torch.zeros_like(group_map)), pool(x))


def test_bad_inputs():
    x, group_map = torch.randn(1, 6, 8, 8), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not fit a grid"):
        group_conv2d(x, nn.Conv2d(6, 6, 3, padding=1), group_map)
    with pytest.raises(ValueError, match="dense or depthwise"):
        group_conv2d(x, nn.Conv2d(6, 6, 3, groups=2), torch.zeros(1, 8, 8, dtype=torch.int64))
