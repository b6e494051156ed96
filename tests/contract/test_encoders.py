"""What every encoder promises (mixmae/encoders/base.py). A new encoder is a line in ENCODERS."""

from itertools import pairwise

import pytest
import torch

from mixmae.encoders.base import Encoder, TokenFill, head_depth
from mixmae.mixing import cell_grid, upsample_group_map
from tests.factories import (
    group_maps,
    noise_images,
    seeded,
    small_pvt,
    small_pvt_v2,
    small_svt,
    small_swin,
    small_vit,
    swin_of_pixels,
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
    "small_swin": small_swin,
    "swin_of_pixels": swin_of_pixels,
    "small_pvt": small_pvt,
    "small_pvt_v2": small_pvt_v2,
    "small_svt": small_svt,
    "small_vit": small_vit,
}
every_encoder = pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS.keys())


def images_for(encoder, batch=2, seed=0):
    return noise_images(batch, encoder.image_size, encoder.in_channels, seed)


def cells_of(encoder):
    return cell_grid(*encoder.image_size, encoder.cell_px)


def maps_for(encoder, num_maps=1, num_images=4):
    return group_maps(num_maps, cells_of(encoder), num_images)


@every_encoder
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize(("grid", "channels"), [((3, 3), 3), ((3, 5), 3), ((7, 10), 1), ((8, 8), 5), ((1, 2), 3)])
def test_features_are_as_declared_at_any_size(build, grid, channels, grouped):
    encoder = build(in_channels=channels)
    assert isinstance(encoder, Encoder)
    size = (grid[0] * encoder.cell_px, grid[1] * encoder.cell_px)
    images = noise_images(2, size, channels)
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
    tokens = encoder(images_for(encoder, 4), maps_for(encoder))
    # Not the plain sum: it does not depend on what comes before a fresh norm.
    (tokens * torch.randn(tokens.shape, generator=seeded(1))).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name, p in encoder.named_parameters() if not p.grad.abs().sum() > 0] == []


@every_encoder
def test_features_and_final_tokens_come_from_one_pass(build):
    encoder = build()
    images = images_for(encoder)
    for given in (None, maps_for(encoder, 2)):
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
    images = images_for(encoder)
    pixels = upsample_group_map(group_map, encoder.image_size) == group
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
    encoder = build()
    group_map = maps_for(encoder, num_maps, num_images)
    assert encoder.group_isolation == "exact"
    for group in range(num_images):
        for outside, inside in leaks(encoder, group_map, True, group):
            assert not outside
            assert inside


@every_encoder
def test_without_a_group_map_groups_do_leak_at_every_stage(build):
    """Or the test above could not fail."""
    encoder = build()
    assert all(outside for outside, _ in leaks(encoder, maps_for(encoder), False, 1))


@every_encoder
def test_cells_may_be_any_number_of_the_last_tokens(build):
    """The smallest ones, and ones of twice the default; the map's shape tells which."""
    encoder, last = build(), build().strides[-1]
    for cell_px in (last, 2 * encoder.cell_px):
        resized = build((4 * cell_px, 2 * cell_px))
        for group in range(2):
            for outside, inside in leaks(resized, group_maps(2, (4, 2), num_images=2), True, group):
                assert not outside
                assert inside


@every_encoder
def test_equal_maps_per_sample_are_the_shared_map(build):
    encoder = build()
    images, group_map = images_for(encoder, 3), maps_for(encoder)
    torch.testing.assert_close(encoder(images, group_map), encoder(images, group_map.expand(3, -1, -1)))


@every_encoder
def test_a_map_of_one_group_is_no_map(build):
    encoder = build().double()  # so that rounding does not matter
    images = images_for(encoder).double()
    torch.testing.assert_close(encoder(images, torch.zeros(1, *cells_of(encoder), dtype=torch.int64)), encoder(images))


@every_encoder
def test_samples_do_not_see_each_other(build):
    encoder = build()
    images = images_for(encoder, 3)
    for group_map in (None, maps_for(encoder, 3)):
        alone = None if group_map is None else group_map[1:2]
        torch.testing.assert_close(encoder(images, group_map)[1:2], encoder(images[1:2], alone), rtol=1e-5, atol=1e-5)


@every_encoder
def test_filled_cells_show_the_token_and_nothing_of_the_image(build):
    encoder = build()
    images = images_for(encoder)
    mask = torch.rand(2, *cells_of(encoder), generator=seeded(1)) < 0.5
    fill = TokenFill(mask=mask, token=torch.randn(encoder.fill_dim, generator=seeded(2)))
    pixels = upsample_group_map(mask, encoder.image_size)[:, None]
    with torch.no_grad():
        filled = encoder(images, None, fill)
        other = encoder(torch.where(pixels, images_for(encoder, seed=3), images), None, fill)
        torch.testing.assert_close(filled, other, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(filled, encoder(images))
        none = TokenFill(mask=torch.zeros_like(mask), token=fill.token)
        torch.testing.assert_close(encoder(images, None, none), encoder(images))


@every_encoder
def test_bad_inputs(build):
    encoder = build()
    images, (height, width), last = images_for(encoder), encoder.image_size, encoder.strides[-1]
    with pytest.raises(ValueError, match=f"multiples of {last} px, got {height} x {width + 1}; .* {height} x {width}"):
        encoder(noise_images(2, (height, width + 1)))
    with pytest.raises(ValueError, match="image sides must be multiples of"):
        build(height + 1)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        encoder(noise_images(2, channels=4))
    tokens = f"{height // last} x {width // last} cells"
    for cells in (5, 2 * height // last):  # cells that no token fits, and cells of half a token
        with pytest.raises(ValueError, match=f"whole number of the encoder's last tokens.*use for example {tokens}"):
            encoder(images, group_maps(grid=(cells, cells)))
    with pytest.raises(ValueError, match="3 group maps for 2 mixes"):
        encoder(images, maps_for(encoder, 3))
