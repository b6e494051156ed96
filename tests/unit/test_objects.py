"""Targets travel as bytes."""

import numpy as np
import pytest
import torch

from mixmae.objects import pack_target, unpack_target


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("canvas", [(16, 24), (7, 9)])
def test_round_trip(count, canvas):
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0, 900, (count, 4)).astype(np.float32)
    labels = generator.integers(0, 300, count)
    masks = generator.random((count, *canvas)) < 0.5
    target = unpack_target(torch.from_numpy(pack_target(boxes, labels, masks, (5, 6))), canvas)
    assert target.size == (5, 6)
    assert target.boxes.numpy().tobytes() == boxes.tobytes()
    assert target.boxes.shape == (count, 4)
    assert target.labels.tolist() == labels.tolist()
    assert target.masks.shape == (count, *canvas)
    assert (target.masks.numpy() == masks).all()
