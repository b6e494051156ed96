"""Images that end the process which decodes them."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks.drilling.deadly import DeadlySource
from mixmae.data.blocks import load_block
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import Source
from mixmae.data.sources import open_source
from mixmae.data.trial import TriedSource
from tests.factories import jpeg

AUGMENT = AugmentConfig(image_size=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """12 images, of which number 3 is broken, so that it is replaced by number 4."""
    folder = tmp_path_factory.mktemp("shards")
    files = [jpeg(row) for row in range(12)]
    files[3] = files[3][:200]
    images = [StoredImage(data, f"{row}.jpg", 0) for row, data in enumerate(files)]
    write_shard(folder / shard_name("train", 0, 1), images, shard_schema(["a"]))
    return open_source(folder)


def test_a_deadly_image_is_a_broken_one(source, tmp_path):
    """Even as the substitute of another; the other images are as they are without it."""
    rows, epochs = np.array([2, 3, 4, 9]), np.zeros(4, dtype=np.int64)
    deadly = pickle.loads(pickle.dumps(DeadlySource(source, 4, "always", str(tmp_path / "mark"))))
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    with contextlib.closing(TriedSource(deadly, 3)) as tried:
        assert tried.num_rows == 12
        block = load_block(tried, AUGMENT, rows, epochs, seed=1)
    broken = DeadlySource(source, 4, "broken", str(tmp_path / "mark"))
    expected = load_block(broken, AUGMENT, rows, epochs, seed=1)
    assert torch.equal(torch.from_numpy(block.images), torch.from_numpy(expected.images))
    assert block.broken.keys() == expected.broken.keys() == {1, 2}
    assert block.broken[1] == expected.broken[1]
    assert block.broken[2].row == 4
    assert block.broken[2].where.endswith("4.jpg")
    assert block.broken[2].reason == "the process that decodes it ends (SIGKILL)"
    left = {child for child in psutil.Process().children(recursive=True) if child.pid not in children}
    assert not [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]


def test_a_process_that_ends_once_is_no_reason(source, tmp_path):
    once = DeadlySource(source, 4, "once", str(tmp_path / "mark"))
    with contextlib.closing(TriedSource(once, 3)) as tried:
        (sample,) = tried.read(0, [4])  # the deadly bytes: they end each process
        assert sample.problem
        (sample,) = tried.read(0, [4])
        assert not sample.problem
        assert sample == source.read(0, [4])[0]


def test_the_deadly_image_is_deadly(source, tmp_path):
    """Or the tests above would show nothing."""
    deadly = DeadlySource(source, 4, "always", str(tmp_path / "mark"))
    pid = os.fork()
    if pid == 0:
        load_block(deadly, AUGMENT, np.array([4]), np.zeros(1, dtype=np.int64), seed=1)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert Path(tmp_path / "mark").exists()
