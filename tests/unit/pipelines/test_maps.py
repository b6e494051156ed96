"""What is said about the class-index maps of a set."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mixmae.data.shards.scenes import DENSE, PIXEL_CLASSES, draw
from mixmae.data.shards.write import StoredImage, shard_schema, write_shard
from mixmae.data.truth import decode_map, encode_map
from pipelines.maps import TILE_PX
from pipelines.stats import stats


def test_classes_of_pixels_are_counted_and_drawn_and_unusable_masks_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    drawn = [draw(0, index) for index in range(9)]
    images = [StoredImage(scene.jpeg, f"{index}.jpg", truth=scene.truth) for index, scene in enumerate(drawn)]
    other = replace(drawn[0].truth, segmentation=encode_map(np.zeros((5, 7), np.uint8)))
    images.append(StoredImage(drawn[0].jpeg, "other.jpg", truth=other))
    write_shard(folder / "train-00000-of-00001.parquet", images, shard_schema(None, dense=DENSE))

    lines: list[str] = []
    stats(str(folder), tmp_path / "out", report=lines.append)
    entry = json.loads((tmp_path / "out/stats.json").read_text())["splits"]["train"]["masks"]
    maps = [decode_map(scene.truth, scene.truth.size, len(PIXEL_CLASSES)) for scene in drawn]
    pixels = np.concatenate([indices.ravel() for indices in maps])
    assert entry["images"] == 9
    for index, name in enumerate(PIXEL_CLASSES):
        assert entry["classes"][name]["share"] == pytest.approx((pixels == index).mean())
        assert entry["classes"][name]["images"] == sum((indices == index).any() for indices in maps)
    (unusable,) = entry["unusable"]
    assert "other.jpg" in unusable["where"]
    assert "5 x 7" in unusable["reason"]
    text = "\n".join(lines)
    assert "masks of 7 classes on 9 images" in text
    assert unusable["reason"] in text
    assert "no classes" not in text
    assert lines[-1].endswith("masks.png")
    with Image.open(tmp_path / "out/masks.png") as page:
        assert page.width == 4 * TILE_PX
