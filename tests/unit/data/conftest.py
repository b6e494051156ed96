"""Small collections of images, in memory and in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard

WriteShards = Callable[..., Path]


def jpeg(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A smooth colour picture that is told from every other by its pixels."""
    low = np.random.default_rng(seed).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=95)


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Writes shards of given sizes and returns their folder; each image is a JPEG of its own, or what `damaged` has."""

    def write(
        *shard_rows: int,
        split: str = "train",
        damaged: dict[int, bytes] | None = None,
        class_names: Sequence[str] | None = ("cat", "dog", "emu"),
    ) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        first = 0
        for number, rows in enumerate(shard_rows):
            images = [
                StoredImage((damaged or {}).get(row, jpeg(row)), f"photos/{row}.jpg", row % 3)
                for row in range(first, first + rows)
            ]
            write_shard(folder / shard_name(split, number, len(shard_rows)), images, shard_schema(class_names))
            first += rows
        return folder

    return write
