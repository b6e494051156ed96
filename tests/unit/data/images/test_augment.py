"""Needs torch, torchvision, Pillow and scikit-image's photographs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torchvision.transforms import RandomResizedCrop

from benchmarks.photographs import make_jpegs, photographs
from mixmae.data.images import tiles
from mixmae.data.images.augment import AugmentConfig, centre_crop, draw_crops, resize, resize_crop
from mixmae.data.images.decode import decode_box, read_header


def draw(config: AugmentConfig, height: int, width: int, count: int, seed: int = 0, epoch: int = 0):
    sizes = np.tile(np.array([[height, width]]), (count, 1))
    return draw_crops(config, sizes, seed=seed, epochs=np.full(count, epoch), rows=np.arange(count))


@pytest.mark.parametrize(("height", "width"), [(400, 485), (10, 300), (300, 10), (1, 1), (2, 3), (9000, 20)])
def test_crops_lie_inside(height, width):
    boxes, _ = draw(AugmentConfig(), height, width, 2000)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(400, 485), (100, 320)])
def test_crops_are_distributed_like_torchvisions(height, width):
    config = AugmentConfig()
    ours, flips = draw(config, height, width, 20_000)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(config.crop_scale), list(config.crop_ratio))  # type: ignore[arg-type]
            for _ in range(4000)
        ]
    )
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 5
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 4
    assert abs(flips.mean() - 0.5) < 0.02


def test_a_crop_depends_on_seed_epoch_and_row_alone():
    config = AugmentConfig()
    boxes, flips = draw(config, 300, 400, 50)
    sizes = np.array([[300, 400]])
    again, flip = draw_crops(config, sizes, seed=0, epochs=np.array([0]), rows=np.array([31]))
    assert np.array_equal(again[0], boxes[31])
    assert flip[0] == flips[31]
    assert not np.array_equal(draw(config, 300, 400, 50, seed=1)[0], boxes)
    assert not np.array_equal(draw(config, 300, 400, 50, epoch=1)[0], boxes)


def test_resize_is_pillows_bicubic_within_rounding():
    pixels = data.astronaut()
    boxes, _ = draw(AugmentConfig(), *pixels.shape[:2], 40)
    differences = []
    for box in boxes:
        out = np.empty((3, 224, 224), dtype=np.uint8)
        resize_crop(pixels, box, False, out)
        top, left, height, width = box
        crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        differences.append(np.abs(out.astype(int) - expected).mean())
    assert np.mean(differences) < 0.1
    assert np.max(differences) < 0.5


def test_a_flip_mirrors_the_result():
    pixels, box = data.astronaut(), np.array([10, 20, 300, 200])
    plain, flipped = np.empty((2, 3, 64, 96), dtype=np.uint8)
    resize_crop(pixels, box, False, plain)
    resize_crop(pixels, box, True, flipped)
    assert np.array_equal(plain[:, :, ::-1], flipped)


def test_a_box_of_the_output_size_is_copied():
    pixels = data.astronaut()
    out = np.empty((3, 64, 64), dtype=np.uint8)
    resize_crop(pixels, np.array([5, 7, 64, 64]), False, out)
    assert np.array_equal(out, pixels[5:69, 7:71].transpose(2, 0, 1))


def test_centre_crop():
    pixels = np.zeros((256, 320, 3), dtype=np.uint8)
    pixels[16:240, 48:272] = 255
    assert (centre_crop(pixels, (224, 224)) == 255).all()
    assert centre_crop(pixels, (32, 64), crop_pct=1.0).shape == (3, 32, 64)
    assert centre_crop(np.full((1, 1, 3), 9, dtype=np.uint8), (8, 8)).mean() == 9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 2.0}, "flip is 2.0"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**fields)


def jpegs() -> list[bytes]:
    """The photographs whole, and parts of them at ImageNet's sizes."""
    whole = []
    for picture in photographs():
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=92)
        whole.append(stream.getvalue())
    return whole + list(make_jpegs(20))


@pytest.mark.parametrize("tiled", [False, True])
def test_crops_are_pillows_within_rounding(tiled):
    if tiled and tiles.tool_path() is None:
        pytest.skip("jpegtran (libjpeg-turbo-progs) is not installed")
    differences = []
    for number, original in enumerate(jpegs()):
        file, offsets = (tiles.retile(original) or (original, None)) if tiled else (original, None)
        header = read_header(file)
        keys = {"epochs": np.arange(12), "rows": np.full(12, number)}
        boxes, flips = draw_crops(AugmentConfig(), np.array([header[:2]] * 12), seed=1, **keys)
        picture = Image.open(io.BytesIO(original))
        for (top, left, height, width), flip in zip(boxes.tolist(), flips.tolist(), strict=True):
            out = torch.empty((3, 224, 224), dtype=torch.uint8)
            resize(decode_box(file, header, (top, left, height, width), offsets), flip, out)
            crop = picture.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)
            expected = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
            differences.append(np.abs(out.numpy().astype(int) - expected.transpose(2, 0, 1)).mean())
    assert len(differences) > 300
    assert np.mean(differences) < 0.1
    assert np.max(differences) < 0.5


@settings(deadline=None, max_examples=60)  # the time of an example depends on what else runs
@given(st.integers(0, 2**62), st.integers(0, 5), st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.data())
def test_crops_are_equal_whoever_draws_them(seed, epoch, rows, data):
    rows = np.array(rows)
    sizes = 30 + np.stack([rows % 400, rows % 300], axis=1)
    epochs = np.full(len(rows), epoch)
    boxes, flips = draw_crops(AugmentConfig(), sizes, seed=seed, epochs=epochs, rows=rows)
    part = np.array(data.draw(st.permutations(range(len(rows)))))[: len(rows) // 2 + 1]
    again = draw_crops(AugmentConfig(), sizes[part], seed=seed, epochs=epochs[part], rows=rows[part])
    assert np.array_equal(boxes[part], again[0])
    assert np.array_equal(flips[part], again[1])
