"""What a run is begun with: its folder, its data."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from mixmae.data.prepare import open_for_training
from mixmae.training import cluster
from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES
from pipelines.run import with_workers


def test_a_folder_that_has_grown_is_packed_anew(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(photos / f"{index}.png")
    before, _ = open_for_training(str(photos), tmp_path / "data", 60)
    Image.new("RGB", (40, 40), (99, 0, 0)).save(photos / "new.png")
    after, _ = open_for_training(str(photos), tmp_path / "data", 60)
    assert after.num_rows == before.num_rows + 1
    assert after.digest != before.digest


def arguments(*, batch_size, micro_batch_size=None, workers=0):
    config = PRETRAIN_RECIPES["demo"]()
    config = replace(config, method=replace(config.method, num_images=2))
    loop = replace(config.loop, batch_size=batch_size, micro_batch_size=micro_batch_size)
    return Arguments(config=replace(config, loop=loop), workers=workers)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "cores", "workers"),
    [(16, None, 2, 2), (16, None, 3, 2), (16, None, 7, 4), (16, None, 64, 8), (6, None, 2, 1), (64, 16, 6, 4)],
)
def test_default_is_the_most_workers_that_can_share_a_batch(monkeypatch, batch_size, micro_batch_size, cores, workers):
    monkeypatch.setattr(cluster, "default_workers", lambda *_: cores)
    given = arguments(batch_size=batch_size, micro_batch_size=micro_batch_size)
    assert with_workers(given).workers == workers


def test_workers_that_were_asked_for_stay_or_are_refused(monkeypatch):
    monkeypatch.setattr(cluster, "default_workers", lambda *_: 8)
    assert with_workers(arguments(batch_size=16, workers=2)).workers == 2
    with pytest.raises(ValueError, match="shared equally by 3 workers"):
        with_workers(arguments(batch_size=16, workers=3))
