"""The hard built-in set: needs scikit-learn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import RidgeClassifier

from mixmae.data.images.decode import decode_rgb
from mixmae.data.shards.drawing import DrawnImage, draw_apart
from mixmae.data.shards.shapes import CLASS_NAMES, MAX_SIDE_PX, MIN_SIDE_PX, draw


@pytest.fixture(scope="module")
def images() -> list[DrawnImage]:
    return [draw(0, index) for index in range(1600)]


def test_an_image_depends_on_seed_and_index_alone(images):
    assert draw(0, 70) == images[70]
    assert list(draw_apart("mixmae.data.shards.shapes", 0, start=68, stop=72)) == images[68:72]
    assert draw(1, 70).jpeg != images[70].jpeg


def test_classes_are_balanced_and_mixed(images):
    labels = np.array([image.label for image in images])
    assert len(CLASS_NAMES) == 20
    assert (np.bincount(labels, minlength=20) == 80).all()
    assert (labels[:20] != labels[20:40]).any()


def test_boxes_and_masks_agree_and_shapes_are_large(images):
    extents = []
    for image in images[:200]:
        pixels = decode_rgb(image.jpeg)
        height, width = pixels.shape[:2]
        assert MIN_SIDE_PX <= height <= MAX_SIDE_PX
        assert MIN_SIDE_PX <= width <= MAX_SIDE_PX
        mask = np.asarray(Image.open(io.BytesIO(image.mask_png))) > 0
        assert mask.shape == (height, width)
        x0, y0, x1, y1 = image.box
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 200
        assert mask[y0].any()
        assert mask[y1 - 1].any()
        assert mask[:, x0].any()
        assert mask[:, x1 - 1].any()
        extents.append(max(x1 - x0, y1 - y0) / min(height, width))
        brightness = pixels @ np.array([0.299, 0.587, 0.114])
        assert abs(brightness[mask].mean() - brightness[~mask].mean()) > 40
    assert min(extents) > 0.42
    assert max(extents) < 0.83


def test_a_linear_classifier_on_pixels_stays_near_chance(images):
    """Chance is 5 %. On the whole set (4,000 + 1,000) ridge and logistic regression on 32 px score 5 to 7.5 %."""
    small = np.stack(
        [np.asarray(Image.open(io.BytesIO(i.jpeg)).resize((24, 24)), dtype=np.float32).ravel() / 255 for i in images]
    )
    labels = np.array([image.label for image in images])
    classifier = RidgeClassifier(alpha=100.0).fit(small[:1200], labels[:1200])
    assert classifier.score(small[1200:], labels[1200:]) < 0.11
