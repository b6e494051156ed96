"""The reconstruction panel shows the right pixels in the right places."""

import numpy as np
import torch

from mixmae.masking import mask_pictures
from mixmae.mixing import cyclic_partners, mix
from mixmae.panels import GAP_PX, GROUP_COLORS, TITLE_PX, reconstruction_panel, to_image

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_pixels_are_un_normalised_and_clipped():
    pixels = torch.tensor([0.0, 1.0, 100.0])[:, None, None].expand(3, 2, 2)
    assert np.asarray(to_image(pixels, mean=MEAN, std=STD))[0, 0].tolist() == [128, 166, 255]


def test_one_channel_becomes_grey():
    assert np.asarray(to_image(torch.zeros(1, 2, 2), mean=(0.5,), std=(0.2,)))[0, 0].tolist() == [128, 128, 128]


def test_tiles_columns_frames_and_pasted_cells():
    size = 64
    levels = torch.tensor([-1.0, 1.0])
    originals = levels[:, None, None, None].expand(2, 3, size, size)
    group_map = torch.tensor([[[0, 1], [1, 0]]])
    partners = cyclic_partners(2, 2)[:1]
    pictures = {
        "originals": originals,
        "mixed": mix(originals, group_map, partners),
        "reconstructions": torch.zeros(1, 2, 3, size, size),
        "group_map": group_map,
        "partners": partners,
    }
    panel = reconstruction_panel(pictures, mean=(0.5,) * 3, std=(0.25,) * 3, caption="x")
    assert panel.size == (5 * (size + GAP_PX) + GAP_PX, 2 * TITLE_PX + size + GAP_PX)
    pixels = np.asarray(panel)

    def at(column: int, x: int, y: int) -> list[int]:
        return pixels[TITLE_PX + y, GAP_PX + column * (size + GAP_PX) + x].tolist()

    low, high, middle = [64] * 3, [191] * 3, [128] * 3
    assert at(0, 48, 16) == low  # image 1, not outlined cell
    assert at(1, 16, 16) == high
    assert at(2, 16, 16) == low  # the mix shows image 1 here ...
    assert at(2, 48, 16) == high  # ... and image 2 there
    assert at(3, 16, 16) == low  # reconstruction 1: what it was shown
    assert at(3, 48, 16) == middle  # and what the model made of the rest
    assert at(4, 48, 16) == high
    assert at(0, 0, 0) == list(GROUP_COLORS[0])
    assert at(4, 32, 0) == list(GROUP_COLORS[1])


def test_a_masked_image_is_a_mix_of_one():
    size = 64
    originals = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, size, size)
    mask = torch.tensor([[[False, True], [False, False]], [[False, False], [False, True]]])
    pictures = mask_pictures(originals, torch.full((2, 3, size, size), 0.5), mask)
    panel = reconstruction_panel(pictures, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert panel.size == (3 * (size + GAP_PX) + GAP_PX, TITLE_PX + 2 * (size + GAP_PX))
    pixels = np.asarray(panel)

    def at(row: int, column: int, x: int, y: int) -> list[int]:
        left, top = GAP_PX + column * (size + GAP_PX), TITLE_PX + row * (size + GAP_PX)
        return pixels[top + y, left + x].tolist()

    low, high, grey, made = [64] * 3, [191] * 3, [128] * 3, [159] * 3
    for column in range(3):
        assert at(0, column, 16, 16) == low  # visible cells are the original's, also in the reconstruction
        assert at(0, column, 0, 0) == list(GROUP_COLORS[0])
        assert at(1, column, 48, 48) == [high, grey, made][column]
        assert at(1, column, 63, 63) == [high, grey, made][column]  # a hidden cell has no outline
    assert at(0, 2, 48, 16) == made
