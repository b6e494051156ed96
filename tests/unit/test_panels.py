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


def test_one_row_per_image_with_its_own_cells():
    size, step = 64, 3 * 64 + GAP_PX  # drawn three times as large
    originals = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, size, size)
    group_map = torch.tensor([[[0, 1], [1, 0]]])
    partners = cyclic_partners(2, 2)[:1]
    pictures = {
        "originals": originals,
        "mixed": mix(originals, group_map, partners),
        "zero_predictions": torch.zeros(1, 2, 3, size, size),
        "reconstructions": torch.full((1, 2, 3, size, size), 0.5),
        "group_map": group_map,
        "partners": partners,
    }
    panel = reconstruction_panel(pictures, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert panel.size == (4 * step + GAP_PX, TITLE_PX + 2 * step + 2 * GAP_PX + 2 * TITLE_PX)  # two lines of caption

    def at(row: int, column: int, x: int, y: int) -> list[int]:
        return list(panel.getpixel((GAP_PX + column * step + 3 * x, TITLE_PX + row * step + 3 * y)))

    low, high, zero, made = [64] * 3, [191] * 3, [128] * 3, [159] * 3
    first, second = (48, 16), (16, 16)  # a pixel in a cell of group 1, and in one of group 0
    for row, levels in enumerate(([low, high, zero, made], [high, high, high, high])):
        assert [at(row, column, *first) for column in range(4)] == levels
    for row, levels in enumerate(([low, low, low, low], [high, low, zero, made])):
        assert [at(row, column, *second) for column in range(4)] == levels
    for row, own, other in ((0, 0, 40), (1, 40, 0)):  # on the upper edge, in a cell of the row's group and of another
        assert [at(row, column, own, 0) == list(GROUP_COLORS[row]) for column in range(4)] == [False, True, True, True]
        assert all(at(row, column, other, 0) == at(row, column, other, 4) for column in range(4))


def test_a_masked_image_is_a_mix_of_one():
    size = 224
    originals = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, size, size)
    mask = torch.tensor([[[False, True], [False, False]], [[False, False], [False, True]]])
    pictures = mask_pictures(originals, {"reconstructions": torch.full((2, 3, size, size), 0.5)}, mask)
    panel = reconstruction_panel(pictures, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert panel.size == (3 * (size + GAP_PX) + GAP_PX, TITLE_PX + 2 * (size + GAP_PX) + TITLE_PX)

    def at(row: int, column: int, x: int, y: int) -> list[int]:
        step = size + GAP_PX
        return list(panel.getpixel((GAP_PX + column * step + x, TITLE_PX + row * step + y)))

    low, high, grey, made = [64] * 3, [191] * 3, [128] * 3, [159] * 3
    for column in range(3):
        assert at(0, column, 16, 16) == low  # visible cells are the original's, also in the reconstruction
        assert (at(0, column, 0, 0) == list(GROUP_COLORS[0])) == (column > 0)
        assert at(0, column, 16, 112) == low  # two visible cells have one outline
        assert at(1, column, 180, 180) == [high, grey, made][column]
        assert at(1, column, 223, 223) == [high, grey, made][column]  # a hidden cell has no outline
    assert at(0, 2, 180, 16) == made
