"""PVT's own: its config, tables and sizes. What all encoders promise is in tests/contract; timm's v2 in reference."""

import dataclasses

import pytest
import torch

from mixmae.encoders.base import TokenFill
from mixmae.encoders.pvt import PvtConfig, PvtEncoder, pvt_large, pvt_medium, pvt_small, pvt_tiny, pvt_v2_b2
from tests.factories import SMALL_PYRAMID, group_maps, noise_images, seeded, tiny_pvt, tiny_pvt_v2


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"in_channels": 0}, "at least 1"),
        ({"depths": (2, 2, 2)}, "one per stage"),
        ({"sr_ratios": (8, 4, 2, 0)}, "at least 1"),
        ({"mlp_ratios": (8.0, 8.0, 4.0, 0.0)}, "above 0"),
        ({"num_heads": (3, 2, 5, 8)}, "change embed_dims or num_heads"),
        ({"sr_ratios": (16, 4, 2, 1)}, "its sr_ratio must divide 8"),
        ({"sr_ratios": (8, 3, 2, 1)}, "its sr_ratio must divide 4"),
        ({"sr_ratios": (8, 4, 2, 2)}, "its sr_ratio must divide 1"),
        ({**SMALL_PYRAMID, "sr_ratios": (8, 4, 2)}, "cells of 8 px, the last stride: its sr_ratio must divide 4"),
        ({"drop_path": 1.0}, "below 1"),
        ({"version": 3}, "1 or 2"),
    ],
)
def test_bad_configs_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        PvtConfig(**options)


@pytest.mark.parametrize(
    ("size", "published"), [(pvt_tiny, 13.2), (pvt_small, 24.5), (pvt_medium, 44.2), (pvt_large, 61.4)]
)
def test_v1_has_the_parameters_of_the_pvt_paper(size, published):
    with torch.device("meta"):
        encoder = PvtEncoder(size())
    head, class_token, its_position = 512 * 1000 + 1000, 512, 512
    count = sum(p.numel() for p in encoder.parameters()) + head + class_token + its_position
    assert round(count / 1e6, 1) == published


@pytest.mark.parametrize("size", [pvt_large, pvt_v2_b2])
@pytest.mark.parametrize(("height", "width"), [(384, 384), (512, 768)])
def test_known_sizes_take_other_images(size, height, width):
    with torch.device("meta"):
        encoder, images = PvtEncoder(dataclasses.replace(size(), depths=(1, 1, 1, 1))), torch.empty(2, 3, height, width)
        assert encoder(images).shape == (2, height // 32 * width // 32, 512)


def test_tables_are_used_as_they_are_for_the_built_size_and_resized_for_others():
    encoder = tiny_pvt((96, 64))
    for stage, grid in zip(encoder.stages, ((24, 16), (12, 8), (6, 4), (3, 2)), strict=True):
        assert stage.positions(grid) is stage.pos_embed
        assert stage.pos_embed.shape[1:3] == grid
    with torch.no_grad():
        encoder.stages[3].pos_embed.copy_(torch.arange(3.0)[:, None, None].expand(3, 2, 32))
    resized = encoder.stages[3].positions((6, 6))
    # The first new row lies at -0.25. Of its four taps only the row of ones counts, 1.25 away: its cubic weight is
    # -0.75 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4). A bilinear table would begin with 0.
    ends = torch.tensor([-0.10546875, 2 + 0.10546875])
    torch.testing.assert_close(resized[0, [0, 5]], ends[:, None, None].expand(2, 6, 32))


def test_every_table_counts_at_another_size():
    encoder, images = tiny_pvt((96, 96)), noise_images(2, (64, 160))
    with torch.no_grad():
        before = encoder(images)
        for stage in encoder.stages:
            stage.pos_embed += torch.randn(stage.pos_embed.shape, generator=seeded())
            after = encoder(images)
            assert not torch.allclose(before, after)
            before = after


def test_filled_cells_of_a_mix_are_not_seen_by_the_overlapping_patches():
    """The contract has the fill without a map. Here: neighbours of one group, some of them filled."""
    encoder, images = tiny_pvt_v2(), noise_images(2)
    mask = torch.tensor([[[False, True, False], [True, False, False], [False, False, True]]])
    fill = TokenFill(mask=mask, token=torch.zeros(encoder.fill_dim))
    pixels = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    changed = torch.where(pixels, noise_images(2, seed=3), images)
    with torch.no_grad():
        group_map = group_maps(num_images=2)
        assert torch.equal(encoder(images, group_map, fill), encoder(changed, group_map, fill))
        assert not torch.equal(encoder(images, group_map), encoder(changed, group_map))


@pytest.mark.parametrize("build", [tiny_pvt, tiny_pvt_v2])
def test_drop_path_is_for_training_only(build):
    config = dataclasses.replace(build().config, drop_path=0.5)
    torch.manual_seed(0)
    encoder, images = PvtEncoder(config), noise_images(2)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_depths_by_hand():
    """Stages of 2, 1, 2, 2 blocks."""
    depths = tiny_pvt().parameter_depths()
    expected = {
        "stages.0.patch_embed.proj.weight": 0,
        "stages.0.pos_embed": 0,
        "stages.0.blocks.0.attn.sr.weight": 1,
        "stages.0.blocks.1.mlp.fc1.bias": 2,
        "stages.1.patch_embed.norm.weight": 3,
        "stages.1.pos_embed": 3,
        "stages.1.blocks.0.norm1.weight": 3,
        "stages.2.pos_embed": 4,
        "stages.3.blocks.1.attn.kv.bias": 7,
        "norm.weight": 7,
    }
    assert {name: depths[name] for name in expected} == expected
    depths = tiny_pvt_v2().parameter_depths()
    assert [depths[f"stages.{stage}.norm.weight"] for stage in range(4)] == [2, 3, 5, 7]
    assert [depths[f"stages.{stage}.patch_embed.proj.bias"] for stage in range(4)] == [0, 3, 4, 6]
