"""Images and objects are moved together, and in the same way for the same row."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixmae.data.images.decode import DecodeError, decode_image
from mixmae.data.images.detect_augment import DetectAugmentConfig, box_of, fitted_size, write_canvas
from mixmae.data.rle import encode_rle
from mixmae.data.shards import scenes
from mixmae.data.truth import DenseClasses, Objects, Truth
from mixmae.objects import unpack_target

CLASSES = DenseClasses(objects=("a", "b"), object_ids=(1, 2))
SIZE = (40, 60)


def one_object(box=(10, 5, 30, 25), *, masked=True, crowd=False, label=1, size=SIZE):
    """An image that is white where its object is."""
    mask = np.zeros(size, dtype=np.bool_)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    pixels = np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2)
    objects = Objects(
        boxes=np.array([box], dtype=np.float32),
        labels=np.array([label]),
        areas=np.array([mask.sum()], dtype=np.float32),
        crowd=np.array([crowd]),
        ids=np.array([1]),
        masks=(encode_rle(mask) if masked else b"",),
    )
    return pixels, Truth(objects=objects, size=size)


def apply(config, pixels, truth, *, row=0, epoch=0, classes=CLASSES):
    out = np.empty((3, *config.size), dtype=np.uint8)
    packed = config.apply(pixels, truth, classes, out, seed=0, epoch=epoch, row=row)
    return out, unpack_target(torch.from_numpy(packed), config.size)


@pytest.mark.parametrize("scale", [(0.1, 0.5), (0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_objects_are_where_their_pixels_are(scale, masked):
    config = DetectAugmentConfig(image_size=(96, 120), scale=scale)
    kept = 0
    for row in range(30):
        pixels, truth = one_object(masked=masked)
        out, target = apply(config, pixels, truth, row=row)
        bright = out[0] > 200
        bright[target.size[0] :], bright[:, target.size[1] :] = False, False
        if not len(target.boxes):
            assert bright.sum() < 40
            continue
        kept += 1
        seen = box_of(bright)
        assert np.abs(target.boxes[0].numpy() - seen).max() <= 2
        if masked:
            assert tuple(target.boxes[0].tolist()) == box_of(target.masks[0].numpy())
            assert (target.masks[0].numpy() != bright).mean() < 0.03
    assert kept > 15


def test_a_row_is_drawn_in_one_way():
    config = DetectAugmentConfig(image_size=64)
    pixels, truth = one_object()
    first, again = (apply(config, pixels, truth, row=3)[0] for _ in range(2))
    assert (first == again).all()
    assert not (first == apply(config, pixels, truth, row=4)[0]).all()
    assert not (first == apply(config, pixels, truth, row=3, epoch=1)[0]).all()


def test_flips_mirror_both():
    pixels, truth = one_object()
    plain, mirrored = (
        apply(DetectAugmentConfig(image_size=SIZE, scale=(1.0, 1.0), flip=flip), pixels, truth) for flip in (0.0, 1.0)
    )
    assert (plain[0] == pixels.transpose(2, 0, 1)).all()
    assert (mirrored[0] == plain[0][:, :, ::-1]).all()
    assert mirrored[1].boxes.tolist() == [[30, 5, 50, 25]]
    assert torch.equal(mirrored[1].masks, plain[1].masks.flip(-1))


def test_what_is_left_of_the_canvas_is_padded():
    pixels, truth = one_object()
    out, target = apply(DetectAugmentConfig(image_size=120, scale=(0.5, 0.5), flip=0.0), pixels, truth)
    assert target.size == (40, 60)
    assert (out[:, :40, :60] == pixels.transpose(2, 0, 1)).all()
    assert set(out[0, 40:].ravel().tolist()) == set(out[0, :, 60:].ravel().tolist()) == {124}
    assert not target.masks[:, 40:].any()


def test_objects_that_are_cut_away_and_crowds_are_left_out():
    config = DetectAugmentConfig(image_size=40, scale=(3.0, 3.0))  # a third of each side is shown
    counts = {len(apply(config, *one_object((0, 0, 6, 6)), row=row)[1].boxes) for row in range(20)}
    assert counts == {0, 1}
    config = DetectAugmentConfig(image_size=40, scale=(1.0, 1.0))
    assert len(apply(config, *one_object())[1].boxes) == 1
    assert len(apply(config, *one_object(crowd=True))[1].boxes) == 0


def test_scenes_keep_their_objects():
    config = DetectAugmentConfig(image_size=192, scale=(1.0, 1.0), flip=0.0)
    for index in range(5):
        scene = scenes.draw(0, index)
        pixels = decode_image(scene.jpeg, 3)
        target = apply(config, pixels, scene.truth, row=index, classes=scenes.DENSE)[1]
        factor = fitted_size(pixels.shape[:2], (192, 192))[0] / pixels.shape[0]
        assert np.abs(target.boxes.numpy() - scene.truth.objects.boxes * factor).max() <= 1.5
        assert target.labels.tolist() == scene.truth.objects.labels.tolist()


def test_nothing_is_an_image_without_objects():
    config = DetectAugmentConfig(image_size=(32, 64))
    target = unpack_target(torch.from_numpy(config.nothing), config.size)
    assert len(target.boxes) == 0
    assert target.size == (32, 64)


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (Truth(problem="its file is gone"), "its file is gone"),
        (Truth(), "nothing is known about its objects"),
        (one_object(size=(41, 60))[1], "for an image of 41 x 60 pixels, and it has 40 x 60"),
        (one_object(label=2)[1], "an object of class 2, and there are 2"),
    ],
)
def test_truth_that_does_not_fit(truth, reason):
    with pytest.raises(DecodeError, match=reason):
        apply(DetectAugmentConfig(image_size=64), one_object()[0], truth)


def test_settings():
    with pytest.raises(ValueError, match="give two factors with 0 < low <= high"):
        DetectAugmentConfig(scale=(2.0, 0.1))
    assert replace(DetectAugmentConfig(), image_size=(3, 5)).size == (3, 5)


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (768, 1024)), ((640, 480), (1024, 768)), ((1, 9999), (1, 1024))]
)
def test_fitting(size, expected):
    assert fitted_size(size, (1024, 1024)) == expected
    out = np.zeros((1, 8, 8), dtype=np.uint8)
    write_canvas(np.full((4, 4, 1), 9, dtype=np.uint8), (6, 6), (0, 0, 6, 6), out)
    assert (out[0, :6, :6] == 9).all()
    assert out[0, 7, 7] == 117
