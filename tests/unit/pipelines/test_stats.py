"""stats.py as a user runs it: on folders and shards, whole and damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.data.source import DataError
from pipelines.stats import CAPTION_PX, CELL_PX, stats
from tests.unit.data.sources.test_hub_truth import as_lists, detected, masked, png, stripes

ROOT = Path(__file__).parents[3]


@pytest.fixture
def photos(tmp_path):
    """20 grey and 10 red images in two classes, and two broken ones."""
    for number in range(30):
        colour = (128, 128, 128) if number < 20 else (255, 0, 0)
        path = tmp_path / "photos" / "train" / ("grey" if number < 20 else "red") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 10 * number, 300), colour).save(path)
    (path.parent / "x.jpg").write_bytes(b"no image")
    (path.parent / "y.jpg").write_bytes(b"")
    held_out = tmp_path / "photos" / "val" / "red" / "v.png"
    held_out.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(held_out)
    return tmp_path / "photos"


def test_a_folder(photos, tmp_path):
    lines: list[str] = []
    content = stats(str(photos), tmp_path / "out", report=lines.append)
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == content
    train = content["splits"]["train"]
    assert content["layout"] == "files"
    assert train["rows"] == train["looked_at"] == 32
    assert train["classes"] == {"grey": 20, "red": 12}
    assert train["shorter_side_px"]["32"] == 3  # 40, 50 and 60 px wide
    assert sum(train["shorter_side_px"].values()) == 30
    assert (train["smallest_px"], train["largest_px"]) == ([40, 300], [330, 300])
    expected = np.array([[128] * 3] * 20 + [[255, 0, 0]] * 10) / 255
    assert (train["pixels"]["images"], train["pixels"]["grey"]) == (30, 20)
    assert np.allclose(train["pixels"]["mean"], expected.mean(axis=0), atol=1e-3)
    assert np.allclose(train["pixels"]["std"], expected.std(axis=0), atol=1e-3)
    assert [record["where"].rsplit("/", 1)[1] for record in train["broken"]] == ["x.jpg", "y.jpg"]
    assert train["broken"][1]["reason"] == "the file is empty"
    assert content["splits"]["validation"]["rows"] == 1
    text = "\n".join(lines)
    for part in ("train: 32 images", "2 classes of 12 to 20 images", "2 broken (6.25 %)", "x.jpg: not an image"):
        assert part in text
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * CELL_PX, 4 * (CELL_PX + CAPTION_PX))
        pixels = np.asarray(sheet)
    assert pixels[CELL_PX // 2, CELL_PX // 2].tolist() == [128, 128, 128]
    assert pixels[3 * (CELL_PX + CAPTION_PX) + CELL_PX // 2, 3 * CELL_PX // 2].tolist() == [255, 0, 0]


def test_a_sample_of_shards(write_shards, tmp_path):
    folder = write_shards(300)
    content = stats(str(folder), tmp_path / "out", sample=50, report=lambda line: None)
    train = content["splits"]["train"]
    assert (train["rows"], train["looked_at"]) == (300, 50)
    assert sum(train["classes"].values()) == 50
    assert stats(str(folder), tmp_path / "out", sample=50, workers=1, report=lambda line: None) == content
    with pytest.raises(DataError, match="sample is 0"):
        stats(str(folder), tmp_path / "out", sample=0)
    with pytest.raises(DataError, match="workers is -1"):
        stats(str(folder), tmp_path / "out", workers=-1)
    with pytest.raises(DataError, match=r"cannot write to /proc/\d+ .*: choose another output folder"):
        stats(str(folder), "/proc/self")  # there, and nobody may write to it


def test_command_line(photos, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "pipelines" / "stats.py"), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = run(photos, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "grey" in done.stdout
    failed = run(tmp_path / "nowhere")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: the data path")
    assert "Traceback" not in failed.stderr


def test_parquet_with_objects_or_masks(tmp_path):
    """What is wrong with objects is counted; masks that are not clear are said to be, and the images are described."""
    objects = as_lists([[[90.0, 1.0, 5.0, 5.0]], *[[[1.0, 1.0, 5.0, 5.0]]] * 19], [[0]] * 20)
    lines: list[str] = []
    folder = detected(tmp_path / "objects" / "train.parquet", objects)
    content = stats(str(folder), tmp_path / "out", report=lines.append)
    assert content["splits"]["train"]["objects"]["objects"] == 19
    assert "outside of their image" in json.dumps(content["met"])
    assert any("boxes that are empty or outside of their image are left out" in line for line in lines)

    folder = masked(tmp_path / "masks" / "train.parquet", *[png(stripes(0, 255))] * 3)
    content = stats(str(folder), tmp_path / "more", report=lines.append)
    assert content["splits"]["train"]["rows"] == 3
    assert any("of the train images no masks or objects: the masks of" in line for line in lines)
