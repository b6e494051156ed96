"""The plain ViT's own: its config, its class token, and running on a part of its tokens."""

import dataclasses

import pytest
import torch

from mixmae.convert import load_weights
from mixmae.encoders.base import SequenceEncoder
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.mixing import upsample_group_map
from tests.factories import group_maps, noise_images, seeded, tiny_vit


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"patch_px": 0}, "for example 16"),
        ({"in_channels": 0}, "at least 1"),
        ({"embed_dim": 98, "num_heads": 7}, "multiple of 4"),
        ({"num_heads": 5}, "multiple of 4 and of num_heads"),
        ({"mlp_ratio": 0.0}, "above 0"),
        ({"drop_path": 1.0}, "below 1"),
    ],
)
def test_bad_configs_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        ViTConfig(**options)


def test_a_class_token_refuses_group_maps():
    encoder = tiny_vit(class_token=True)
    assert encoder.group_isolation == "none"
    with pytest.raises(ValueError, match="class_token=False"):
        encoder(noise_images(2), group_maps())
    assert torch.isfinite(encoder(noise_images(2))).all()


@pytest.mark.parametrize("patch_px", [8, 32])
def test_no_group_reads_another_whatever_the_patch(patch_px):
    encoder = ViTEncoder(dataclasses.replace(tiny_vit().config, patch_px=patch_px))
    images, group_map = noise_images(2), group_maps()
    pixels = upsample_group_map(group_map, (96, 96)) == 1
    changed = torch.where(pixels[:, None], noise_images(2, seed=1), images)
    with torch.no_grad():
        before, after = encoder.features(images, group_map)[0], encoder.features(changed, group_map)[0]
    own = upsample_group_map(group_map, tuple(before.shape[2:]))[0] == 1
    assert own.any()
    assert ((before != after).any(dim=1) == own).all()


@pytest.mark.parametrize("class_token", [False, True], ids=["plain", "class-token"])
def test_hidden_tokens_do_not_exist(class_token):
    """Nor does their number or their order matter; each token keeps its place."""
    encoder, images = tiny_vit(class_token=class_token), noise_images(2)
    assert isinstance(encoder, SequenceEncoder)
    everything = torch.arange(36).expand(2, -1)
    torch.testing.assert_close(encoder.encode_visible(images, everything), encoder(images), rtol=1e-5, atol=1e-5)

    visible = torch.stack([torch.randperm(36, generator=seeded(b))[:9] for b in range(2)])
    hidden = torch.ones(2, 36, dtype=torch.bool).scatter(1, visible, False).view(2, 6, 6)
    changed = torch.where(upsample_group_map(hidden, (96, 96))[:, None], noise_images(2, seed=1), images)
    encoded = encoder.encode_visible(images, visible)
    assert torch.equal(encoder.encode_visible(changed, visible), encoded)
    torch.testing.assert_close(encoder.encode_visible(images, visible.flip(1)).flip(1), encoded, rtol=1e-5, atol=1e-5)
    moved = encoder.encode_visible(images, (visible + 1) % 36)
    assert not torch.allclose(moved, encoded, atol=1e-3)


def test_a_group_alone_is_what_it_is_in_a_mix():
    """Masked self-attention is MAE's encoder, run for each image of the mix."""
    encoder, images, group_map = tiny_vit(), noise_images(2), group_maps()
    visible = (upsample_group_map(group_map, (6, 6)).flatten(1) == 2).nonzero()[:, 1].expand(2, -1)
    alone = encoder.encode_visible(images, visible)
    mixed = encoder(images, group_map).gather(1, visible[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(alone, mixed, rtol=1e-5, atol=1e-5)


def test_visible_of_another_batch():
    with pytest.raises(ValueError, match=r"visible must be \(2, n\)"):
        tiny_vit().encode_visible(noise_images(2), torch.zeros(1, 4, dtype=torch.int64))


def test_another_size_reads_the_table_that_loading_into_that_size_gives():
    built, other, images = tiny_vit(96), tiny_vit((64, 160)), noise_images(2, (64, 160))
    load_weights(other, built.state_dict(), made_for=(96, 96))
    torch.testing.assert_close(built(images), other(images))
