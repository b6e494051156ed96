"""Masks: counts, draws, and that what is taken out goes back to where it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.masking import (
    draw_masks,
    hide,
    mask_pictures,
    masked_mean,
    masks_of_batch,
    num_removed,
    place_tokens,
    visible_cells,
)
from tests.factories import noise_images, seeded


@pytest.mark.parametrize(
    ("num_cells", "ratio", "removed"),
    [(36, 0.6, 22), (49, 0.6, 30), (25, 0.6, 15), (9, 0.6, 6), (196, 0.75, 147), (36, 0.75, 27), (50, 0.75, 38)],
)
def test_counts_of_both_papers(num_cells, ratio, removed):
    """SimMIM at 192 and 224 px; MAE with 14 x 14 patches. Their two formulas are one."""
    assert num_removed(num_cells, ratio) == removed
    assert removed == math.ceil(num_cells * ratio)
    assert num_cells - removed == int(num_cells * (1 - ratio))


def test_counts_forgive_floating_point():
    assert math.ceil(100 * 0.55) == 56
    assert num_removed(100, 0.55) == 55
    assert int(25 * (1 - 0.8)) == 4
    assert num_removed(25, 0.8) == 20


@pytest.mark.parametrize(("num_cells", "ratio"), [(2, 0.6), (1, 0.5), (9, 0.95), (9, 0.0), (9, 1.0)])
def test_some_cells_must_be_removed_and_some_left(num_cells, ratio):
    with pytest.raises(ValueError, match="use larger images"):
        num_removed(num_cells, ratio)


@given(
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    ratio=st.sampled_from([0.5, 0.6, 0.75]),
    num_masks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_mask_removes_the_same_number(grid, ratio, num_masks, seed):
    mask = draw_masks(grid, ratio, seeded(seed), num_masks)
    assert mask.dtype == torch.bool
    assert mask.shape == (num_masks, *grid)
    assert (mask.flatten(1).sum(1) == math.ceil(grid[0] * grid[1] * ratio)).all()
    assert torch.equal(mask, draw_masks(grid, ratio, seeded(seed), num_masks))


def test_masks_differ_and_each_cell_is_removed_equally_often():
    generator = seeded()
    mask = draw_masks((7, 7), 0.6, generator, 4000)
    assert len(mask.unique(dim=0)) == 4000
    assert not torch.equal(draw_masks((7, 7), 0.6, generator, 4000), mask)
    # The share of 4000 draws has a deviation of 0.0077 around 30 of 49.
    torch.testing.assert_close(mask.float().mean(0), torch.full((7, 7), 30 / 49), rtol=0, atol=0.04)


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_parts_of_a_batch_get_the_masks_of_the_whole(cut):
    whole = draw_masks((3, 5), 0.6, seeded(), 8)
    parts = [draw_masks((3, 5), 0.6, seeded(), cut), draw_masks((3, 5), 0.6, seeded(), 8 - cut, first_mask=cut)]
    assert torch.equal(torch.cat(parts), whole)


def test_hidden_cells_are_blank_and_others_untouched():
    images, mask = noise_images(2, (64, 96)), torch.tensor([[[True, False, False], [False, False, True]]])
    hidden = hide(images, mask)
    assert (hidden[:, :, :32, :32] == 0).all()
    assert (hidden[:, :, 32:, 64:] == 0).all()
    assert torch.equal(hidden[:, :, :32, 32:], images[:, :, :32, 32:])
    assert torch.equal(hidden[:, :, 32:, :64], images[:, :, 32:, :64])


def test_visible_cells_and_their_tokens_go_back_to_their_places():
    mask = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    visible = visible_cells(mask)
    assert visible.tolist() == [[1, 2], [0, 3]]
    tokens = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert place_tokens(tokens, visible, 4)[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]
    in_any_order = place_tokens(tokens.flip(1), visible.flip(1), 4)
    assert torch.equal(in_any_order, place_tokens(tokens, visible, 4))


def test_masked_mean_by_hand():
    error = torch.tensor([[1.0, 100.0], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(error, mask).item() == 3.0


def test_pictures_are_a_mix_of_one():
    images, made, mask = noise_images(2), noise_images(2, seed=1), draw_masks((3, 3), 0.6, seeded(), 2)
    pictures = mask_pictures(images, {"reconstructions": made}, mask)
    assert torch.equal(pictures["mixed"], hide(images, mask))
    assert torch.equal(pictures["reconstructions"][:, 0], made)
    assert torch.equal(pictures["group_map"] == 1, mask)
    assert pictures["partners"].tolist() == [[0], [1]]


def test_bad_inputs_name_the_remedy():
    def prepare(mask, generator=None):
        return masks_of_batch(mask, num_samples=2, grid=(3, 3), mask_ratio=0.6, generator=generator, first_sample=0)

    one = draw_masks((3, 3), 0.6, seeded())
    assert torch.equal(prepare(one), one.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"pass generator= .* or pass mask="):
        prepare(None)
    for bad in (one.long(), one[0], one.expand(3, -1, -1), draw_masks((3, 4), 0.6, seeded())):
        with pytest.raises(ValueError, match=r"bool of shape \(2 or 1, 3, 3\)"):
            prepare(bad)
    with pytest.raises(ValueError, match="nothing to predict"):
        prepare(torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="this mask leaves 3 to 4"):
        visible_cells(torch.tensor([[[True, False, False, False]], [[False] * 4]]))
    with pytest.raises(ValueError, match="at least one"):
        visible_cells(torch.ones(2, 3, 3, dtype=torch.bool))
