"""Swin's own: its config and its tables. What all encoders promise is in tests/contract."""

import dataclasses

import pytest
import torch

from mixmae.encoders.swin import PatchMerging, SwinConfig, SwinEncoder, swin_tiny
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


def test_position_table_is_stored_for_the_built_size_and_renewed_for_others():
    built, other = tiny_swin((96, 96)), tiny_swin((64, 160))
    assert built.state_dict()["pos_embed"].shape == (1, 24 * 24, 16)
    assert torch.equal(built.positions((16, 40)), other.positions((16, 40)))
    with torch.no_grad():
        built.pos_embed.zero_()
    assert built.positions((24, 24)).abs().max() == 0  # the stored table is the one that is used


def test_one_size_built_for_another_gives_the_same_features():
    images = noise_images(2, (64, 160))
    torch.testing.assert_close(tiny_swin((96, 96))(images), tiny_swin((64, 160))(images))


def test_no_position_table_where_it_is_off():
    with_table = tiny_shifted_swin()
    without = SwinEncoder(dataclasses.replace(with_table.config, absolute_positions=False))
    without.load_state_dict({name: value for name, value in with_table.state_dict().items() if name != "pos_embed"})
    with torch.no_grad():
        with_table.pos_embed.zero_()
    assert torch.equal(without(noise_images(2)), with_table(noise_images(2)))


def test_drop_path_is_for_training_only():
    config = dataclasses.replace(tiny_swin().config, drop_path=0.5)
    torch.manual_seed(0)
    encoder, images = SwinEncoder(config), noise_images(2)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_initial_weights():
    torch.manual_seed(0)
    encoder = SwinEncoder(dataclasses.replace(swin_tiny(), depths=(1, 1, 1, 1)))
    block = encoder.stages[1].blocks[0]
    limit = (6 / (192 + 3 * 192)) ** 0.5  # xavier: the root of 6 / (fan in + fan out)
    assert limit * 0.99 < block.attn.qkv.weight.abs().max() <= limit
    assert encoder.patch_embed.proj.weight.abs().max() <= (6 / (48 + 96)) ** 0.5
    assert block.attn.qkv.bias.abs().max() == 0
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
