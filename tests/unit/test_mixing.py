"""Identities of group maps, pairing and mixing, for every K."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.layers.patch_embed import PatchEmbed
from mixmae.mixing import (
    cell_grid,
    check_group_map,
    cyclic_partners,
    draw_group_map,
    group_sizes,
    hidden_mask,
    mix,
    tokens_per_cell,
    unmix,
    upsample_group_map,
)
from tests.factories import group_maps, noise_images, seeded

EVERY_K = pytest.mark.parametrize("num_images", [2, 3, 4, 5])


def sizes(group_map, num_images):
    """(num_maps, K): cells of each group."""
    return torch.stack([torch.bincount(one.flatten(), minlength=num_images) for one in group_map])


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda g: g[0] * g[1] >= 5),
    num_images=st.integers(2, 5),
    num_maps=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_groups_partition_the_grid_in_balance(grid, num_images, num_maps, seed):
    group_map = draw_group_map(grid, num_images, seeded(seed), num_maps)
    assert group_map.shape == (num_maps, *grid)
    assert group_map.dtype == torch.int64
    assert set(group_map.unique().tolist()) == set(range(num_images))
    counted = sizes(group_map, num_images)
    assert (counted.sum(1) == grid[0] * grid[1]).all()
    assert (counted.max(1).values - counted.min(1).values <= 1).all()


@EVERY_K
def test_larger_groups_rotate_over_the_maps_of_a_batch(num_images):
    counted = sizes(draw_group_map((7, 7), num_images, seeded(), num_maps=num_images), num_images)
    assert (counted.sum(0) == 49).all()  # over K maps every image has shown as many cells as any other


@EVERY_K
def test_larger_groups_rotate_over_draws(num_images):
    generator = seeded()
    counted = torch.cat([sizes(draw_group_map((7, 7), num_images, generator), num_images) for _ in range(60)])
    larger = counted == counted.max(dim=1, keepdim=True).values
    assert larger.any(dim=0).all()


def test_every_cell_falls_to_every_group_equally_often():
    maps = draw_group_map((3, 3), 4, seeded(), num_maps=4000)
    for group in range(4):
        share = (maps == group).float().mean(0)
        assert (share - 0.25).abs().max() < 0.03  # four std of a share of 4000 draws


def test_maps_are_a_function_of_the_generator():
    first, second = seeded(1), seeded(1)
    assert torch.equal(draw_group_map((7, 7), 4, first), draw_group_map((7, 7), 4, second))
    assert not torch.equal(draw_group_map((7, 7), 4, first), group_maps(grid=(7, 7), seed=1))


def test_grid_that_cannot_hold_the_images():
    with pytest.raises(ValueError, match="larger images, smaller cells, or mix fewer"):
        draw_group_map((1, 3), 4, seeded())


@EVERY_K
def test_each_image_is_in_k_mixes_once_in_every_group(num_images):
    partners = cyclic_partners(3 * num_images, num_images)
    assert partners.dtype == torch.int64
    for group in range(num_images):
        assert sorted(partners[:, group].tolist()) == list(range(3 * num_images))
    assert all(len(set(row.tolist())) == num_images for row in partners)


def test_partners_by_hand():
    assert cyclic_partners(4, 2).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert cyclic_partners(3, 3).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


@EVERY_K
def test_partners_do_not_depend_on_how_a_batch_is_cut(num_images):
    part = cyclic_partners(2 * num_images, num_images)
    assert torch.equal(cyclic_partners(4 * num_images, num_images), torch.cat([part, part + 2 * num_images]))


@pytest.mark.parametrize(("num_samples", "near"), [(7, "4 or 8"), (3, "example 4"), (0, "example 4")])
def test_batch_that_is_no_multiple_of_k(num_samples, near):
    with pytest.raises(ValueError, match=near):
        cyclic_partners(num_samples, 4)


@EVERY_K
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
def test_an_image_is_intact_at_its_own_cells(num_images, per_sample, grid):
    num_mixes = 2 * num_images
    images = noise_images(num_mixes, (grid[0] * 32, grid[1] * 32), channels=2)
    group_map = draw_group_map(grid, num_images, seeded(), num_mixes if per_sample else 1)
    partners = cyclic_partners(num_mixes, num_images)
    mixed = mix(images, group_map, partners)
    pixels = group_map.repeat_interleave(32, 1).repeat_interleave(32, 2).expand(num_mixes, -1, -1)
    for index in range(num_mixes):
        for group in range(num_images):
            own = pixels[index] == group
            assert torch.equal(mixed[index][:, own], images[partners[index, group]][:, own])


def test_mix_keeps_dtype_and_takes_any_memory_layout():
    images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, generator=seeded())
    group_map, partners = group_maps(), cyclic_partners(4, 4)
    mixed = mix(images, group_map, partners)
    assert mixed.dtype == torch.uint8
    assert torch.equal(mixed, mix(images.contiguous(memory_format=torch.channels_last), group_map, partners))


def test_mixing_pixels_is_mixing_tokens():
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, 4)
    images, group_map, partners = noise_images(4), group_maps(4), cyclic_partners(4, 4)
    tokens = embed(images).permute(0, 3, 1, 2)  # (B, C, 24, 24)
    of_pixels = embed(mix(images, group_map, partners)).permute(0, 3, 1, 2)
    torch.testing.assert_close(of_pixels, mix(tokens, group_map, partners), rtol=0, atol=1e-6)


def test_fewer_mixes_than_images():
    images, partners = noise_images(4), torch.tensor([[3, 1]])
    group_map = group_maps(num_images=2)
    mixed = mix(images, group_map, partners)
    assert mixed.shape == (1, 3, 96, 96)
    assert torch.equal(mixed[0, :, :32, :32], images[3 if group_map[0, 0, 0] == 0 else 1, :, :32, :32])


@EVERY_K
def test_maps_agree_at_all_stages(num_images):
    group_map = draw_group_map((7, 5), num_images, seeded(), 2)
    for factor in (8, 4, 2, 1):  # strides 4, 8, 16, 32
        fine = upsample_group_map(group_map, (7 * factor, 5 * factor))
        for row in range(factor):
            for column in range(factor):
                assert torch.equal(fine[:, row::factor, column::factor], group_map)


@EVERY_K
def test_every_cell_is_visible_for_exactly_one_image(num_images):
    group_map = draw_group_map((7, 7), num_images, seeded(), 3)
    hidden = hidden_mask(group_map, num_images)
    assert hidden.shape == (3, num_images, 7, 7)
    assert ((~hidden).sum(1) == 1).all()
    assert torch.equal((~hidden).int().argmax(1), group_map)


@EVERY_K
def test_unmix_gives_each_token_to_its_own_image(num_images):
    group_map = draw_group_map((3, 3), num_images, seeded(), 2)
    tokens = torch.randn(2, 9, 4, generator=seeded())
    apart = unmix(tokens, hidden_mask(group_map, num_images).flatten(2), torch.zeros(4))
    torch.testing.assert_close(apart.sum(1), tokens)
    assert torch.equal(apart[1, group_map[1, 0, 0], 0], tokens[1, 0])


def test_disagreeing_shapes():
    images, group_map, partners = noise_images(4), group_maps(), cyclic_partners(4, 4)
    with pytest.raises(ValueError, match="one map, or one for each mix"):
        check_group_map(group_maps(3), num_mixes=4)
    with pytest.raises(ValueError, match="int64"):
        check_group_map(group_map.float(), num_mixes=4)
    with pytest.raises(ValueError, match="has 3 x 3 cells, but the images have 2 x 3"):
        check_group_map(group_map, num_mixes=4, grid=(2, 3))
    with pytest.raises(ValueError, match="cannot be cut into 5 x 5 cells"):
        mix(images, group_maps(grid=(5, 5)), partners)
    with pytest.raises(ValueError, match="does not divide"):
        upsample_group_map(group_map, (10, 9))
    with pytest.raises(ValueError, match="disagree"):
        unmix(torch.zeros(2, 9, 4), torch.zeros(1, 4, 8, dtype=torch.bool), torch.zeros(4))
    with pytest.raises(ValueError, match="224 x 96"):
        cell_grid(225, 97, 32)
    with pytest.raises(ValueError, match="multiples of 32 px, got 8 x 97; use for example 32 x 96"):
        cell_grid(8, 97, 32)
    for cell_px in (0, 6, 12):
        with pytest.raises(ValueError, match=f"cell of {cell_px} px would cut .* make cell_px a multiple of 8"):
            tokens_per_cell(cell_px, 8)


def test_group_sizes():
    assert group_sizes(draw_group_map((7, 7), 4, seeded(), 5)) == (13, 12, 12, 12)  # whichever group is the large one
    assert group_sizes(draw_group_map((4, 4), 2, seeded(), 3, 0.5)) == (8, 4, 4)
    assert group_sizes(torch.tensor([[[0, 0, 2]]])) == (2, 1, 0)
    assert group_sizes(torch.tensor([[[0, 0, 1]], [[0, 0, 0]]])) == ()
