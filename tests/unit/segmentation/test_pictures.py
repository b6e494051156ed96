"""Colours and panels."""

import numpy as np

from mixmae.segmentation.pictures import GAP_PX, TILE_PX, TITLE_PX, Shown, overlay, palette, segmentation_panel
from mixmae.segmentation.step import IGNORE


def test_classes_have_colours_of_their_own():
    one = palette(tuple(map(str, range(150))))
    assert (one == palette(tuple(map(str, range(150))))).all()
    apart = np.abs(one[:7, None].astype(int) - one[None, :7]).sum(axis=2) + 999 * np.eye(7, dtype=int)
    assert apart.min() > 90
    assert len({tuple(colour) for colour in one[:150].tolist()}) > 140
    assert (one[IGNORE] == 255).all()


def test_an_overlay_mixes():
    pixels, colours = np.full((2, 2, 3), 100, dtype=np.uint8), palette(("a", "b"))
    mixed = np.asarray(overlay(pixels, np.array([[0, 1], [1, 0]], dtype=np.uint8), colours)).astype(float)
    assert np.abs(mixed[0, 0] - (0.6 * colours[0] + 40)).max() <= 0.5
    assert np.asarray(overlay(pixels[..., :1], np.zeros((2, 2), dtype=np.uint8), colours)).shape == (2, 2, 3)


def test_a_panel_shows_errors_where_truth_and_prediction_differ():
    truth = np.zeros((20, 20), dtype=np.uint8)
    truth[:, 15:] = IGNORE
    predicted = np.zeros_like(truth)
    predicted[10:] = 1
    panel = np.asarray(segmentation_panel([Shown(np.zeros((20, 20, 3), np.uint8), truth, predicted)], ("a", "b")))
    left = GAP_PX + 3 * (TILE_PX + GAP_PX)
    errors = panel[TITLE_PX : TITLE_PX + TILE_PX, left : left + TILE_PX].astype(int)
    assert (errors[20, 20] == errors[20, 20, 0]).all()  # right: grey
    assert errors[150, 20, 0] > errors[150, 20, 1] + 100  # wrong: red
    assert (errors[150, 170] == 255).all()  # ignored: white
