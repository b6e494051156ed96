"""Sets of labelled images for tests of jobs and pipelines."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def coloured_jpeg(seed: int, label: int) -> bytes:
    """Noise on a ground whose colour tells the class, so that neighbours are not a matter of luck."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (70, 80, 3)) + 40 * label * np.array([1, 0, -1]) + 60
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path) -> Callable[..., Path]:
    """Writes a set of given labels, or 60 images without a label column for None, and returns its folder.

    Of the training images the first `broken` are no images.
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
