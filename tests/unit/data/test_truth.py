"""Class-index maps: what cannot be used, how they follow their image, and that shards keep all that is known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mixmae.data.images.decode import DecodeError
from mixmae.data.shards import scenes
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError, RowRange
from mixmae.data.sources import open_source
from mixmae.data.sources.joined import join
from mixmae.data.truth import DenseClasses, Truth, decode_map, encode_map, fitted, read_truths, with_maps


def test_a_map_is_as_it_was():
    indices = np.array([[0, 1, 2], [255, 254, 3]], dtype=np.uint8)
    assert (decode_map(Truth(segmentation=encode_map(indices)), (2, 3), 255) == indices).all()


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (Truth(), "it has no mask"),
        (Truth(problem="its mask is gone"), "its mask is gone"),
        (Truth(segmentation=b"\x89PNG"), "does not decode"),
        (Truth(segmentation=encode_map(np.zeros((3, 2), np.uint8))), "3 x 2 pixels and the image of 2 x 3"),
        (Truth(segmentation=encode_map(np.full((2, 3), 5, np.uint8))), "the class 5, and there are 5"),
        (Truth(segmentation=encode_map(np.zeros((2, 3, 3), np.uint8))), "not 8-bit class indices"),
    ],
)
def test_maps_that_cannot_be_used(truth, words):
    with pytest.raises(DecodeError, match=words):
        decode_map(truth, (2, 3), 5)


def _jpeg(height: int, width: int, orientation: int = 1) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_a_map_turns_with_its_photo():
    """Stored 2 x 3 and shown 3 x 2, a quarter to the right: the left column becomes the top row."""
    indices = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    photo = _jpeg(2, 3, orientation=6)
    turned = fitted(Truth(segmentation=encode_map(indices)), photo, photo)
    assert decode_map(turned, (3, 2), 9).tolist() == [[4, 1], [5, 2], [6, 3]]
    upright = fitted(Truth(segmentation=encode_map(indices.T)), photo, photo)
    assert (decode_map(upright, (3, 2), 9) == indices.T).all()


def test_a_map_shrinks_with_its_image_and_keeps_its_values():
    indices = np.kron(np.array([[0, 200], [7, 3]], dtype=np.uint8), np.ones((10, 10), dtype=np.uint8))
    small = fitted(Truth(segmentation=encode_map(indices)), _jpeg(20, 20), _jpeg(10, 10))
    assert small.size == (10, 10)
    assert decode_map(small, (10, 10), 255).tolist() == indices[::2, ::2].tolist()


def test_a_map_of_another_image():
    wrong = fitted(Truth(segmentation=encode_map(np.zeros((4, 4), np.uint8))), _jpeg(2, 3), _jpeg(2, 3))
    assert not wrong.segmentation
    assert wrong.problem == "its mask is of 4 x 4 pixels and the image of 2 x 3"


def test_shards_keep_all_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "NUM_TRAIN", 80)
    monkeypatch.setattr(scenes, "NUM_VALIDATION", 40)
    monkeypatch.setattr(scenes, "PER_SHARD", 40)
    make_shards("scenes", tmp_path, report=lambda line: None)
    source = with_maps(open_source(str(tmp_path)))
    assert source.dense == scenes.DENSE
    assert not source.has_labels
    rows = [79, 0, 41]
    for parts in (source, RowRange(base=source, start=10, stop=80), join([source, source], [1.0, 2.0])):
        shift = 10 if isinstance(parts, RowRange) else 0
        wanted = [row for row in rows if row >= shift]
        found = read_truths(with_maps(parts), [row - shift for row in wanted])
        for row, truth in zip(wanted, found, strict=True):
            expected = scenes.draw(0, row).truth
            assert (truth.segmentation, truth.image_id, truth.size) == (expected.segmentation, row, expected.size)
            for name, value in vars(expected.objects).items():
                assert np.array_equal(getattr(truth.objects, name), value), name


def test_a_source_without_maps(shards):
    with pytest.raises(DataError, match="has no masks of classes, and segmentation needs them"):
        with_maps(open_source(shards("set", [0, 1, 2, 3])))


def test_too_many_classes():
    with pytest.raises(DataError, match="there are 256 classes"):
        DenseClasses(pixels=tuple(map(str, range(256))))
