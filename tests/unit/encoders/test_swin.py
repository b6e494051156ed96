"""Swin's own: its config and its tables. What all encoders promise is in tests/contract."""

import json
from dataclasses import replace

import pytest
import torch

from mixmae.convert import load_weights
from mixmae.encoders.build import config_from_json, config_to_json
from mixmae.encoders.swin import PatchMerging, SwinConfig, SwinEncoder, swin_base, swin_tiny, with_dense_windows
from tests.factories import noise_images, tiny_shifted_swin, tiny_swin


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"in_channels": 0}, "at least 1"),
        ({"patch_px": 3}, "one of 1, 2, 4, 8, got 3"),
        ({"depths": (2,)}, "two to four stages"),
        ({"depths": (2, 2, 2, 2, 2)}, "two to four stages"),
        ({"depths": (2, 0, 2, 2)}, "at least 1"),
        ({"depths": (2, 2, 2)}, "num_heads needs 3 numbers of at least 1, one per stage of depths"),
        ({"window_sizes": (7, 7, 7, 0)}, "at least 1"),
        ({"embed_dim": 98}, "multiple of 4"),
        ({"num_heads": (3, 8, 16, 32)}, "change embed_dim or num_heads"),
        ({"mlp_ratio": 0.0}, "above 0"),
        ({"drop_path": 1.0}, "below 1"),
    ],
)
def test_bad_configs_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        SwinConfig(**options)


def test_merging_joins_neighbours_column_by_column():
    merging = PatchMerging(1)
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    x = torch.arange(8.0).view(1, 2, 4, 1)
    assert merging(x).tolist() == [[[[0, 4, 1, 5], [2, 6, 3, 7]]]]


def test_another_size_reads_the_table_that_loading_into_that_size_gives():
    """One rule: a model that meets another size computes what one built for it does, with the same weights."""
    built, other = tiny_swin((96, 96)), tiny_swin((64, 160))
    assert built.state_dict()["pos_embed"].shape == (1, 24 * 24, 16)
    with torch.no_grad():
        built.pos_embed += torch.randn(built.pos_embed.shape, generator=torch.Generator().manual_seed(0))
    load_weights(other, built.state_dict(), made_for=(96, 96))
    assert torch.equal(built.positions((16, 40)), other.positions((16, 40)))
    images = noise_images(2, (64, 160))
    torch.testing.assert_close(built(images), other(images))
    with torch.no_grad():
        built.pos_embed.zero_()
    assert built.positions((24, 24)).abs().max() == 0  # the stored table is the one that is used


def test_dense_windows_are_the_papers():
    config = with_dense_windows(swin_base())
    assert config.window_sizes == (16, 16, 16, 16)
    assert [index + 1 for index, side in enumerate(config.block_windows(2)) if side == 32] == [6, 12, 18]
    assert config.block_windows(3) == (16, 16)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    with torch.device("meta"):
        blocks = SwinEncoder(config).stages[2].blocks
    assert [len(block.attn.relative_position_bias_table) for block in blocks[4:6]] == [31**2, 63**2]


def test_a_wide_block_sees_further_than_the_others_of_its_stage():
    """Third stage: 8 x 8 tokens in windows of 4, and one block with a window of 8."""

    def reach(*wide: int) -> int:
        torch.manual_seed(0)
        config = replace(swin_tiny(), embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), image_size=128)
        encoder = SwinEncoder(replace(config, window_sizes=(1, 1, 4, 1), wide_blocks=wide, wide_window=8))
        images = noise_images(1, (128, 128)).requires_grad_()
        encoder.features(images)[2][0, :, 0, 0].sum().backward()
        return int((images.grad.abs().amax(dim=(0, 1)) > 0).sum())

    assert reach() == 64 * 64
    assert reach(2) == reach(1) == 128 * 128


@pytest.mark.parametrize("depths", [(2, 2, 5, 2), (2, 2)])
def test_wide_blocks_must_exist(depths):
    sizes = {"depths": depths, "num_heads": (4, 8, 16, 32)[: len(depths)], "window_sizes": (7,) * len(depths)}
    with pytest.raises(ValueError, match=r"wide_blocks names blocks of the third stage, which has [05]; got"):
        SwinConfig(**sizes, wide_blocks=(6,))


def test_no_position_table_where_it_is_off():
    with_table = tiny_shifted_swin()
    without = SwinEncoder(replace(with_table.config, absolute_positions=False))
    without.load_state_dict({name: value for name, value in with_table.state_dict().items() if name != "pos_embed"})
    with torch.no_grad():
        with_table.pos_embed.zero_()
    assert torch.equal(without(noise_images(2)), with_table(noise_images(2)))


def test_drop_path_is_for_training_only():
    config = replace(tiny_swin().config, drop_path=0.5)
    torch.manual_seed(0)
    encoder, images = SwinEncoder(config), noise_images(2)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_initial_weights():
    torch.manual_seed(0)
    encoder = SwinEncoder(replace(swin_tiny(), depths=(1, 1, 1, 1)))
    block = encoder.stages[1].blocks[0]
    limit = (6 / (192 + 3 * 192)) ** 0.5  # xavier: the root of 6 / (fan in + fan out)
    assert limit * 0.99 < block.attn.qkv.weight.abs().max() <= limit
    assert encoder.patch_embed.proj.weight.abs().max() <= (6 / (48 + 96)) ** 0.5
    assert block.attn.qkv.bias.abs().max() == 0
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
