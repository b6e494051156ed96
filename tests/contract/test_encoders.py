"""What every encoder promises (mixmae/encoders/base.py). A new encoder is a line in ENCODERS."""

from itertools import pairwise

import pytest
import torch

from mixmae.encoders.base import Encoder, TokenFill, head_depth
from mixmae.mixing import upsample_group_map
from tests.factories import (
    group_maps,
    noise_images,
    seeded,
    tiny_pcpvt,
    tiny_pvt,
    tiny_pvt_v2,
    tiny_resnetv2,
    tiny_shifted_swin,
    tiny_svt,
    tiny_swin,
    tiny_vit,
)

ENCODERS = {
    "swin": tiny_swin,
    "shifted_swin": tiny_shifted_swin,
    "pvt": tiny_pvt,
    "pvt_v2": tiny_pvt_v2,
    "twins_pcpvt": tiny_pcpvt,
    "twins_svt": tiny_svt,
    "vit": tiny_vit,
    "resnetv2": tiny_resnetv2,
}
every_encoder = pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS.keys())


@every_encoder
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize(
    ("size", "channels"), [((96, 96), 3), ((96, 160), 3), ((224, 320), 1), ((256, 256), 5), ((32, 64), 3)]
)
def test_features_are_as_declared_at_any_size(build, size, channels, grouped):
    encoder, images = build(in_channels=channels), noise_images(2, size, channels)
    assert isinstance(encoder, Encoder)
    grid = (size[0] // 32, size[1] // 32)
    group_map = group_maps(grid=grid, num_images=2) if grouped else None
    features = encoder.features(images, group_map)
    assert len(features) == len(encoder.strides) == len(encoder.channels)
    for feature, stride, width in zip(features, encoder.strides, encoder.channels, strict=True):
        assert feature.shape == (2, width, size[0] // stride, size[1] // stride)
        assert torch.isfinite(feature).all()
    tokens = encoder(images, group_map)
    last = encoder.strides[-1]
    assert tokens.shape == (2, (size[0] // last) * (size[1] // last), encoder.channels[-1])
    assert torch.isfinite(tokens).all()


@every_encoder
def test_every_parameter_gets_a_gradient(build):
    encoder = build()
    tokens = encoder(noise_images(4), group_maps())
    # Not the plain sum: it does not depend on what comes before a fresh norm.
    (tokens * torch.randn(tokens.shape, generator=seeded(1))).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name, p in encoder.named_parameters() if not p.grad.abs().sum() > 0] == []


@every_encoder
def test_features_and_final_tokens_come_from_one_pass(build):
    encoder, images, group_map = build(), noise_images(2), group_maps(2)
    for given in (None, group_map):
        assert torch.equal(encoder.final(encoder.features(images, given)[-1], given), encoder(images, given))


@every_encoder
def test_every_parameter_has_one_depth(build):
    encoder = build()
    depths = encoder.parameter_depths()
    assert list(depths) == [name for name, _ in encoder.named_parameters()]
    assert sorted(set(depths.values())) == list(range(encoder.num_blocks + 1))
    assert head_depth(encoder, "official") == encoder.num_blocks
    assert head_depth(encoder, "timm") == encoder.num_blocks + 1
    in_order = [depth for name, depth in depths.items() if ".blocks." in name]
    assert all(first <= second for first, second in pairwise(in_order))


def leaks(encoder, group_map, masked, group):
    """For each stage: does changing the pixels of a group change a feature outside of it?  And inside?"""
    images = noise_images(2)
    pixels = upsample_group_map(group_map, (96, 96)) == group
    changed = images + pixels[:, None] * torch.randn(images.shape, generator=seeded(1))
    given = group_map if masked else None
    with torch.no_grad():
        pairs = zip(encoder.features(images, given), encoder.features(changed, given), strict=True)
        results = []
        for before, after in pairs:
            own = (upsample_group_map(group_map, tuple(before.shape[2:])) == group).expand(2, -1, -1)
            moved = (before != after).any(dim=1)
            results.append((bool(moved[~own].any()), bool(moved[own].all())))
    return results


@every_encoder
@pytest.mark.parametrize("num_images", [2, 3, 4, 5])
@pytest.mark.parametrize("num_maps", [1, 2], ids=["shared", "per-sample"])
def test_no_group_reads_another_at_any_stage(build, num_images, num_maps):
    """The test that makes MixMAE MixMAE: not one bit moves outside the group whose pixels changed."""
    encoder, group_map = build(), group_maps(num_maps, num_images=num_images)
    assert encoder.group_isolation == "exact"
    for group in range(num_images):
        for outside, inside in leaks(encoder, group_map, True, group):
            assert not outside
            assert inside


@every_encoder
def test_without_a_group_map_groups_do_leak_at_every_stage(build):
    """Or the test above could not fail."""
    assert all(outside for outside, _ in leaks(build(), group_maps(), False, 1))


@every_encoder
def test_equal_maps_per_sample_are_the_shared_map(build):
    encoder, images, group_map = build(), noise_images(3), group_maps()
    torch.testing.assert_close(encoder(images, group_map), encoder(images, group_map.expand(3, -1, -1)))


@every_encoder
def test_a_map_of_one_group_is_no_map(build):
    encoder, images = build().double(), noise_images(2).double()  # so that rounding does not matter
    torch.testing.assert_close(encoder(images, torch.zeros(1, 3, 3, dtype=torch.int64)), encoder(images))


@every_encoder
def test_samples_do_not_see_each_other(build):
    encoder, images = build(), noise_images(3)
    for group_map in (None, group_maps(3)):
        alone = None if group_map is None else group_map[1:2]
        torch.testing.assert_close(encoder(images, group_map)[1:2], encoder(images[1:2], alone), rtol=1e-5, atol=1e-5)


@every_encoder
def test_filled_cells_show_the_token_and_nothing_of_the_image(build):
    encoder, images = build(), noise_images(2)
    mask = torch.rand(2, 3, 3, generator=seeded(1)) < 0.5
    fill = TokenFill(mask=mask, token=torch.randn(encoder.fill_dim, generator=seeded(2)))
    pixels = upsample_group_map(mask, (96, 96))[:, None]
    with torch.no_grad():
        filled = encoder(images, None, fill)
        other = encoder(torch.where(pixels, noise_images(2, seed=3), images), None, fill)
        torch.testing.assert_close(filled, other, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(filled, encoder(images))
        none = TokenFill(mask=torch.zeros_like(mask), token=fill.token)
        torch.testing.assert_close(encoder(images, None, none), encoder(images))


@every_encoder
def test_bad_inputs(build):
    encoder, images = build(), noise_images(2)
    with pytest.raises(ValueError, match="multiples of 32 px"):
        encoder(noise_images(2, (96, 80)))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        encoder(noise_images(2, channels=4))
    with pytest.raises(ValueError, match="the images have 3 x 3 cells"):
        encoder(images, group_maps(grid=(7, 7)))
    with pytest.raises(ValueError, match="3 group maps for 2 mixes"):
        encoder(images, group_maps(3))
