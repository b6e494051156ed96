"""Images and class maps are cut, turned and padded alike; colours change where they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixmae.data.images.segment_augment import PADDING, SegmentAugmentConfig, distort_colours, resized_size
from mixmae.data.truth import IGNORE, DenseClasses, Truth, encode_map

PLAIN = SegmentAugmentConfig(
    image_size=32, shorter_px=32, longer_px=128, scale=(1.0, 1.0), flip=0.0, photometric=0.0, max_class_share=1.0
)


def _apply(config: SegmentAugmentConfig, indices: np.ndarray, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image whose grey tells its class: (H, W) of both."""
    pixels = np.repeat((10 * indices)[..., None], 3, axis=2).astype(np.uint8)
    out = np.zeros((3, *config.size), dtype=np.uint8)
    classes = DenseClasses(pixels=tuple(map(str, range(20))))
    target = config.apply(pixels, Truth(segmentation=encode_map(indices)), classes, out, seed=0, epoch=1, row=row)
    return out, target.reshape(config.size)


def _blocks(height: int, width: int, side: int = 16) -> np.ndarray:
    """Squares of 16 px, each of its own class."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return ((rows[:, None] * 4 + columns) % 20).astype(np.uint8)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(0.5, 0.9), (1.0, 1.0), (1.1, 2.0)])
def test_pixels_and_classes_go_together(flip, scale):
    config = replace(PLAIN, flip=flip, scale=scale)
    for row in range(12):
        image, target = _apply(config, _blocks(64, 80), row)
        shown = target != IGNORE
        right = np.abs(image[0].astype(int) - 10 * target.astype(int)) < 6
        assert right[shown].mean() > 0.6  # but for the blurred borders of the squares
        assert (image[:, ~shown] == np.array(PADDING[3])[:, None]).all()


def test_nothing_changes_where_nothing_is_asked():
    indices = _blocks(32, 32, 8)
    image, target = _apply(PLAIN, indices)
    assert (target == indices).all()
    assert (image[0] == 10 * indices).all()
    flipped, turned = _apply(replace(PLAIN, flip=1.0), indices)
    assert (turned == indices[:, ::-1]).all()
    assert (flipped[0] == 10 * indices[:, ::-1]).all()


def test_small_images_are_padded_right_and_below_after_the_flip():
    image, target = _apply(replace(PLAIN, shorter_px=16, flip=1.0), _blocks(64, 64))
    assert (target[16:] == IGNORE).all()
    assert (target[:, 16:] == IGNORE).all()
    assert (target[:16, :16] != IGNORE).all()
    assert (image[:, 20, 20] == PADDING[3]).all()


def test_draws_depend_on_the_row_alone():
    config = replace(PLAIN, scale=(0.5, 2.0), flip=0.5, photometric=0.5, max_class_share=0.75)
    one, two = (_apply(config, _blocks(64, 80), 3) for _ in range(2))
    assert (one[0] == two[0]).all()
    assert (one[1] == two[1]).all()
    assert (one[1] != _apply(config, _blocks(64, 80), 4)[1]).any()


def test_a_crop_of_one_class_is_avoided_where_another_can_be_had():
    """One quarter of the image has a second class: with the limit most crops show it, and no class has too much."""
    indices = np.zeros((64, 64), dtype=np.uint8)
    indices[24:56, 24:56] = 1

    def shares(limit: float) -> list[float]:
        config = replace(PLAIN, shorter_px=64, max_class_share=limit)
        crops = [_apply(config, indices, row)[1] for row in range(40)]
        return [max(np.bincount(crop.ravel(), minlength=2)) / crop.size for crop in crops]

    assert np.mean(np.array(shares(0.75)) < 0.75) > 0.9
    assert np.mean(np.array(shares(1.0)) < 0.75) < 0.8


def test_ignored_pixels_do_not_count_as_a_class():
    indices = np.zeros((64, 64), dtype=np.uint8)
    indices[:, 32:] = IGNORE
    config = replace(PLAIN, shorter_px=64, max_class_share=0.75)
    assert _apply(config, indices)[1].shape == (32, 32)  # no crop can have two classes: the last one stays


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 200), (512, 1024)), ((100, 800), (256, 2048)), ((683, 512), (683, 512))]
)
def test_resized_size(size, expected):
    assert resized_size(size, 512, 2048) == expected


def test_colours_change_in_their_ranges():
    image = np.random.default_rng(0).integers(60, 190, (3, 8, 8), dtype=np.uint8)
    rest = [0.9] * 9  # 0.9 is above any probability of 0.5: nothing is done
    assert (distort_colours(image, np.array(rest), 0.5) == image).all()
    brighter = distort_colours(image, np.array([0.0, 1.0, *rest[2:]]), 0.5)
    assert (brighter.astype(int) - image == 32).all()
    flatter = distort_colours(image, np.array([0.9, 0.9, 0.0, 0.0, *rest[4:]]), 0.5)
    assert np.abs(flatter - 0.5 * image).max() <= 0.5
    grey = distort_colours(image, np.array([*rest[:4], 0.0, 0.0, *rest[6:]]), 0.5)
    spread = np.ptp(image.astype(int), axis=0), np.ptp(grey.astype(int), axis=0)
    assert np.abs(spread[1] - 0.5 * spread[0]).max() <= 3
    red = np.zeros((3, 2, 2), dtype=np.uint8)
    red[0] = 200
    hue = distort_colours(red, np.array([*rest[:6], 0.0, 1.0, 0.9]), 0.5)
    assert (hue[1] > 100).all()  # 36 degrees further: orange
    assert (hue[2] == 0).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha(channels):
    image = np.full((channels, 4, 4), 100, dtype=np.uint8)
    changed = distort_colours(image, np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]), 1.0)
    assert changed.shape == image.shape
    assert changed[0, 0, 0] != 100
    if channels == 4:
        assert (changed[3] == 100).all()


@pytest.mark.parametrize(
    "change",
    [{"shorter_px": 0}, {"shorter_px": 600, "longer_px": 500}, {"scale": (2.0, 1.0)}, {"max_class_share": 0.0},
     {"photometric": 1.5}, {"flip": -1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SegmentAugmentConfig(**change)
