"""What is said about the objects of a set."""

import json

import numpy as np
import pytest
from PIL import Image

from mixmae.data.shards.scenes import CLASS_NAMES, DENSE, draw
from mixmae.data.shards.write import StoredImage, shard_schema, write_shard
from mixmae.data.truth import Truth
from pipelines.stats import stats


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    images = [StoredImage(draw(0, index).jpeg, f"{index}.jpg", truth=draw(0, index).truth) for index in range(20)]
    images.append(StoredImage(draw(0, 20).jpeg, "20.jpg", truth=Truth()))
    write_shard(folder / "train-00000-of-00001.parquet", images, shard_schema(None, dense=DENSE))
    return folder


def test_objects_are_counted_and_drawn(scenes, tmp_path):
    lines: list[str] = []
    stats(str(scenes), tmp_path / "out", report=lines.append)
    truths = [draw(0, index).truth.objects for index in range(20)]
    labels = np.concatenate([item.labels for item in truths])
    areas = np.concatenate([item.areas for item in truths])
    entry = json.loads((tmp_path / "out/stats.json").read_text())["splits"]["train"]["objects"]
    assert entry["objects"] == len(labels)
    assert entry["images_unknown"] == 1
    assert entry["images_without"] == sum(not len(item.labels) for item in truths)
    assert entry["classes"] == {name: int((labels == index).sum()) for index, name in enumerate(CLASS_NAMES)}
    assert list(entry["sizes"].values()) == [
        int((areas < 1024).sum()),
        int(((areas >= 1024) & (areas < 9216)).sum()),
        int((areas >= 9216).sum()),
    ]
    text = "\n".join(lines)
    assert f"{len(labels)} objects: {len(labels) / 20:.1f} in an image" in text
    assert "nothing is known about 1 images" in text
    assert "objects.png" in lines[-1]
    assert Image.open(tmp_path / "out/objects.png").size == (1200, Image.open(tmp_path / "out/objects.png").height)


def test_a_sample(scenes, tmp_path):
    stats(str(scenes), tmp_path / "out", sample=5, report=lambda line: None)
    entry = json.loads((tmp_path / "out/stats.json").read_text())["splits"]["train"]["objects"]
    assert entry["images"] + entry["images_unknown"] == 5
