"""The built-in set for dense tasks: its two kinds of truth agree with each other and with the picture."""

from __future__ import annotations

import colorsys
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mixmae.data.images.decode import decode_rgb
from mixmae.data.rle import decode_rle
from mixmae.data.shards.drawing import draw_apart
from mixmae.data.shards.scenes import CLASS_NAMES, MAX_OBJECTS, DrawnScene, draw
from mixmae.data.truth import decode_map


@pytest.fixture(scope="module")
def scenes() -> list[DrawnScene]:
    return [draw(0, index) for index in range(300)]


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    apart = list(draw_apart("mixmae.data.shards.scenes", 0, start=8, stop=10))
    assert [pickle.dumps(scene) for scene in apart] == [pickle.dumps(draw(0, 8)), pickle.dumps(draw(0, 9))]
    assert apart[0].jpeg == scenes[8].jpeg
    assert draw(1, 8).jpeg != scenes[8].jpeg


def test_maps_boxes_and_masks_say_the_same(scenes):
    for scene in scenes[:60]:
        truth, objects = scene.truth, scene.truth.objects
        height, width = decode_rgb(scene.jpeg).shape[:2]
        assert truth.size == (height, width)
        indices = decode_map(truth, (height, width), 7)
        painted = np.zeros((height, width), dtype=np.uint8)
        for box, label, area, rle in zip(objects.boxes, objects.labels, objects.areas, objects.masks, strict=True):
            mask = decode_rle(rle, truth.size)
            assert not painted[mask].any()  # masks are what is visible: no two share a pixel
            painted[mask] = 1 + label
            x0, y0, x1, y1 = box.astype(int)
            assert mask[y0:y1, x0:x1].sum() == mask.sum() == area > 20
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()
            assert mask[:, x1 - 1].any()
        assert (painted == indices).all()


def test_some_are_empty_and_sizes_are_of_all_kinds(scenes):
    counts = [len(scene.truth.objects.labels) for scene in scenes]
    assert 0.05 < np.mean(np.array(counts) == 0) < 0.16
    assert max(counts) == MAX_OBJECTS
    areas = np.concatenate([scene.truth.objects.areas for scene in scenes])
    small, large = (areas < 32**2).mean(), (areas > 96**2).mean()
    assert 0.3 < small < 0.7
    assert large > 0.005
    labels = np.bincount(np.concatenate([scene.truth.objects.labels for scene in scenes]), minlength=6)
    assert labels.min() > 0.6 * labels.mean()


def test_some_objects_are_covered_in_part(scenes):
    """The later object lies on top: a mask that another one cuts has fewer pixels than its whole outline."""
    touching = 0
    for scene in scenes[:100]:
        boxes = scene.truth.objects.boxes
        for one in range(len(boxes)):
            for two in range(one):
                low, high = np.maximum(boxes[one][:2], boxes[two][:2]), np.minimum(boxes[one][2:], boxes[two][2:])
                touching += bool((high > low).all())
    assert touching > 10


def test_a_class_has_its_hue(scenes):
    right = total = 0
    for scene in scenes[:100]:
        pixels, indices = decode_rgb(scene.jpeg), decode_map(scene.truth, scene.truth.size, 7)
        for label in scene.truth.objects.labels.tolist():
            red, green, blue = np.median(pixels[indices == 1 + label], axis=0) / 255
            hue = colorsys.rgb_to_hsv(red, green, blue)[0]
            right += round(hue * len(CLASS_NAMES)) % len(CLASS_NAMES) == label
            total += 1
    assert right > 0.9 * total


def test_a_map_is_a_small_png(scenes):
    assert max(len(scene.truth.segmentation) for scene in scenes) < 3000
    with Image.open(io.BytesIO(scenes[3].truth.segmentation)) as image:
        assert image.format == "PNG"
