"""ResNet v2's own: its config, its standardised filters, and half precision."""

import pytest
import torch

from mixmae.encoders.resnetv2 import ResNetV2Config, StdConv2d
from mixmae.mixing import upsample_group_map
from tests.factories import group_maps, noise_images, tiny_resnetv2, tiny_swin


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"in_channels": 0}, "at least 1"),
        ({"depths": (3, 4, 6)}, "one per stage"),
        ({"stem_dim": 100}, "multiple of num_norm_groups"),
        ({"drop_path": 1.0}, "below 1"),
    ],
)
def test_bad_configs_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        ResNetV2Config(**options)


def test_a_filter_counts_by_its_shape_alone():
    conv, x = StdConv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    before = conv(x, None)
    with torch.no_grad():
        conv.weight.mul_(5.0).add_(1.0)
    torch.testing.assert_close(conv(x, None), before, rtol=1e-5, atol=1e-5)


def test_a_fill_is_as_wide_as_what_it_replaces():
    assert tiny_resnetv2().fill_dim == 8
    assert tiny_swin().fill_dim == tiny_swin().channels[0]


def test_pretraining_in_half_precision_keeps_groups_apart():
    encoder, images, group_map = tiny_resnetv2(), noise_images(2), group_maps()
    pixels = upsample_group_map(group_map, (96, 96)) == 1
    changed = torch.where(pixels[:, None], noise_images(2, seed=1), images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = encoder(images, group_map), encoder(changed, group_map)
    own = group_map.flatten(1)[0] == 1
    assert torch.equal(before[:, ~own], after[:, ~own])
    assert not torch.equal(before[:, own], after[:, own])
