"""The whole way from bytes to the crop against Pillow's, on scikit-image's and scikit-learn's photographs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import make_jpegs, photographs
from mixmae.data.images import tiles
from mixmae.data.images.augment import AugmentConfig, draw_crops, resize
from mixmae.data.images.decode import decode_box, read_header


def jpegs() -> list[bytes]:
    """The photographs whole, and parts of them at ImageNet's sizes."""
    whole = []
    for picture in photographs():
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=92)
        whole.append(stream.getvalue())
    return whole + list(make_jpegs(20))


@pytest.mark.parametrize("tiled", [False, True])
def test_crops_are_pillows_within_rounding(tiled):
    if tiled and tiles.tool_path() is None:
        pytest.skip("jpegtran (libjpeg-turbo-progs) is not installed")
    differences = []
    for number, original in enumerate(jpegs()):
        file, offsets = (tiles.retile(original) or (original, None)) if tiled else (original, None)
        header = read_header(file)
        keys = {"epochs": np.arange(12), "rows": np.full(12, number)}
        boxes, flips = draw_crops(AugmentConfig(), np.array([header[:2]] * 12), seed=1, **keys)
        picture = Image.open(io.BytesIO(original))
        for (top, left, height, width), flip in zip(boxes.tolist(), flips.tolist(), strict=True):
            out = torch.empty((3, 224, 224), dtype=torch.uint8)
            resize(decode_box(file, header, (top, left, height, width), offsets), flip, out)
            crop = picture.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)
            expected = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
            differences.append(np.abs(out.numpy().astype(int) - expected.transpose(2, 0, 1)).mean())
    assert len(differences) > 300
    assert np.mean(differences) < 0.1
    assert np.max(differences) < 0.5
