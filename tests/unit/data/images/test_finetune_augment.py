"""Needs Pillow, scikit-image's photographs, and timm as the reference of the operations."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from timm.data import auto_augment

from mixmae.data.blocks import load_block
from mixmae.data.images.finetune_augment import OPERATIONS, FinetuneAugmentConfig, augment_further
from mixmae.data.sources import open_source


def picture() -> np.ndarray:
    return np.ascontiguousarray(photographs.astronaut()[:96, 200:320])


def further(config: FinetuneAugmentConfig, seed: int = 0, epoch: int = 0, row: int = 0) -> np.ndarray:
    image = np.ascontiguousarray(picture().transpose(2, 0, 1))
    augment_further(config, image, seed=seed, epoch=epoch, row=row)
    return image


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("strength", [0.9, 0.33])
def test_operations_are_timms(monkeypatch, number, sign, strength):
    name = auto_augment._RAND_INCREASING_TRANSFORMS[number]
    monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)
    image = Image.fromarray(picture())
    level = auto_augment.LEVEL_TO_ARG[name]
    arguments = level(strength * 10, {}) if level else ()
    kwargs = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    expected = auto_augment.NAME_TO_OP[name](image, *arguments, **kwargs)
    assert np.array_equal(np.asarray(OPERATIONS[number](image, strength, sign)), np.asarray(expected)), name


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_operations_take_the_weakest_and_the_strongest(number, strength):
    """One draw in 650 has full strength; posterizing must keep a bit then, which Pillow insists on."""
    image = Image.fromarray(picture())
    for sign in (-1.0, 1.0):
        assert OPERATIONS[number](image, strength, sign).size == image.size


def test_posterizing_at_full_strength_keeps_one_bit():
    levels = np.asarray(OPERATIONS[4](Image.fromarray(picture()), 1.0, 1.0))
    assert set(np.unique(levels)) <= {0, 128}


def test_it_depends_on_seed_epoch_and_row_alone():
    config = FinetuneAugmentConfig(erasing=1.0, operation_probability=1.0)
    assert np.array_equal(further(config, 1, 2, 3), further(config, 1, 2, 3))
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not np.array_equal(further(config, 1, 2, 3), further(config, *other))


def test_how_often():
    plain = picture().transpose(2, 0, 1)
    neither = [np.array_equal(further(FinetuneAugmentConfig(erasing=0.0), row=row), plain) for row in range(400)]
    # Two operations, each with probability one half, and a few that change nothing here.
    assert 0.2 < np.mean(neither) < 0.36
    erased = [
        not np.array_equal(further(FinetuneAugmentConfig(num_operations=0), row=row), plain) for row in range(400)
    ]
    assert 0.19 < np.mean(erased) < 0.31


def test_an_erased_rectangle_is_noise_of_the_right_size():
    config = FinetuneAugmentConfig(num_operations=0, erasing=1.0)
    plain = picture().transpose(2, 0, 1)
    shares, values = [], []
    for row in range(200):
        changed = (further(config, row=row) != plain).any(axis=0)
        tall, wide = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        shares.append((tall[-1] - tall[0] + 1) * (wide[-1] - wide[0] + 1) / changed.size)
        values.append(further(config, row=row)[0, tall[0], wide[0]])
    assert min(shares) > 0.015
    assert max(shares) < 0.35
    assert 105 < np.mean(values) < 142
    assert 40 < np.std(values) < 75


def test_a_block_of_finetuning_is_made_of_its_rows_alone(write_shards):
    source = open_source(write_shards(40))
    config = FinetuneAugmentConfig(image_size=32, erasing=0.5)
    whole = load_block(source, config, np.arange(40), np.zeros(40, dtype=int), seed=0)
    part = load_block(source, config, np.array([31, 7]), np.zeros(2, dtype=int), seed=0)
    assert np.array_equal(whole.images[[31, 7]], part.images)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"magnitude": 11.0}, "magnitude is 11.0"),
        ({"erasing": 2.0}, "erasing is 2.0"),
        ({"num_operations": -1}, "num_operations is -1"),
        ({"erasing_area": (0.5, 0.1)}, "erasing_area"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        FinetuneAugmentConfig(**fields)


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_grey_images_are_augmented_as_coloured_ones_that_are_grey(number):
    grey = Image.fromarray(picture()).convert("L")
    found = np.asarray(OPERATIONS[number](grey, 0.7, 1.0)).astype(int)
    expected = np.asarray(OPERATIONS[number](grey.convert("RGB"), 0.7, 1.0)).astype(int)
    free = (expected != expected[..., :1]).any(axis=2)  # of the mean colour, which is not grey
    assert free.mean() < 0.4
    assert np.abs(found - expected[..., 0])[~free].max() <= 1


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels):
    plain = np.full((channels, 40, 50), 90, dtype=np.uint8)
    config = FinetuneAugmentConfig(erasing=1.0, operation_probability=1.0, num_operations=3)
    changed = np.stack([further_of(plain, config, row) for row in range(60)])
    assert changed.shape == (60, channels, 40, 50)
    assert changed.std(axis=0).min() > 0


def test_colours_change_and_alpha_stays():
    opaque = np.full((4, 40, 50), 255, dtype=np.uint8)
    opaque[:3] = np.arange(50) * 5
    config = FinetuneAugmentConfig(erasing=0.0, operation_probability=1.0)
    changed = np.stack([further_of(opaque, config, row) for row in range(60)])
    assert (changed[:, 3] == 255).all()
    assert (changed[:, :3] != opaque[:3]).any(axis=(1, 2, 3)).mean() > 0.9


def further_of(plain: np.ndarray, config: FinetuneAugmentConfig, row: int) -> np.ndarray:
    image = plain.copy()
    augment_further(config, image, seed=0, epoch=0, row=row)
    return image
