"""Small sets of images in files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from tests.factories import jpeg

WriteShards = Callable[..., Path]


def coloured_jpeg(seed: int, label: int) -> bytes:
    """Noise on a ground whose colour tells the class, so that neighbours are not a matter of luck."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (70, 80, 3)) + 40 * label * np.array([1, 0, -1]) + 60
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path) -> Callable[..., Path]:
    """Writes a set of given labels, or 60 images without a label column for None, and returns its folder.

    The first `broken` images of each split are no images.
    """

    def write(name: str, labels: list[int] | None, validation: list[int] | None = None, broken: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, values in (("train", labels), ("validation", validation)):
            if split == "train" or values is not None:
                images = [
                    {"bytes": b"no image" if row < broken else coloured_jpeg(row, label), "path": f"{row}.jpg"}
                    for row, label in enumerate(values or [0] * 60)
                ]
                columns = {"image": images, **({} if values is None else {"label": values})}
                pq.write_table(pa.table(columns), folder / f"{split}-0.parquet", row_group_size=16)
        return folder

    return write


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[..., Path]:
    """Writes JPEGs, each with its own pixels, below a folder; returns the folder."""

    def write(*names: str, below: str = "photos") -> Path:
        root = tmp_path / below
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(jpeg(number))
        return root

    return write


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Writes shards of given sizes and returns their folder; row r has jpeg(r), or what `damaged` has for it."""

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
