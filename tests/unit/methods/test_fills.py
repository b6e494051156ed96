"""The ablations' fills: what stands in the hidden cells of one image, and what the encoder makes of it."""

import pytest
import torch

from mixmae.mixing import upsample_group_map
from mixmae.patches import patchify
from tests.factories import ablation_mixmae, group_maps, noise_images, seeded


@pytest.mark.parametrize("fill", ["zero", "learnable", "shuffle", "zoom"])
def test_fills_show_one_image_and_reconstruct_it(fill):
    method, images = ablation_mixmae(fill), noise_images(5)
    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    assert pictures["partners"].tolist() == [[b] for b in range(5)]
    assert pictures["reconstructions"].shape == (5, 1, 3, 96, 96)
    group_map = pictures["group_map"]
    assert group_map.unique().tolist() == [0, 1]
    assert (group_map == 0).sum() in (4, 5)  # half of nine cells
    visible = upsample_group_map(group_map, (96, 96))[:, None] == 0
    assert torch.equal(pictures["mixed"] * visible, images * visible)
    assert not torch.equal(pictures["mixed"], images)


def test_shuffled_cells_are_the_hidden_ones_in_another_order():
    method, images = ablation_mixmae("shuffle"), noise_images(4)
    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    hidden = pictures["group_map"].flatten().bool()
    before, after = (patchify(pictures[name], 32)[:, hidden] for name in ("originals", "mixed"))
    pairs = (before[:, :, None] == after[:, None]).all(dim=3)  # which hidden cell stands where
    assert (pairs.sum(dim=1) == 1).all()
    assert (pairs.sum(dim=2) == 1).all()
    assert len({tuple(row.flatten().tolist()) for row in pairs}) > 1  # one order per image


def test_zoomed_pixels_are_an_enlarged_crop():
    ramp = torch.linspace(-1, 1, 96).expand(2, 3, 96, 96).contiguous()
    pictures = ablation_mixmae("zoom")(ramp, generator=seeded(), with_pictures=True).pictures
    hidden = upsample_group_map(pictures["group_map"], (96, 96))[0] == 1
    slopes = [row.diff().abs() for row in pictures["mixed"][0, 0]]
    inside = [slope[(cells[1:] & cells[:-1])] for slope, cells in zip(slopes, hidden, strict=True)]
    # A box of 0.2 to 0.8 of the side, stretched to the whole, rises 0.2 to 0.8 as fast.
    shares = torch.cat(inside)[5:].median() / (2 / 95)
    assert 0.15 < shares < 0.85


def test_what_fills_a_cell_reaches_the_encoder():
    """Zeros, a learned token, other cells and a crop give other encodings of the same visible cells."""
    images, group_map = noise_images(4), group_maps(num_images=2)
    losses = {}
    for fill in ("zero", "learnable", "shuffle", "zoom"):
        method = ablation_mixmae(fill)
        losses[fill] = method(images, generator=seeded(), group_map=group_map).loss.item()
    assert len(set(losses.values())) == 4
    learned = ablation_mixmae("learnable")
    learned(images, group_map=group_map).loss.backward()
    assert learned.mask_token is not None
    assert learned.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("fill", ["zero", "learnable"])
def test_filled_pixels_are_never_read(fill):
    method, images, group_map = ablation_mixmae(fill), noise_images(4), group_maps(num_images=2)
    other = torch.where(upsample_group_map(group_map, (96, 96))[:, None] == 0, images, noise_images(4, seed=1))
    encoded = [method.encode(method.mix(pixels, method.draw(pixels, None, group_map))) for pixels in (images, other)]
    assert torch.equal(*encoded)
