"""What a run is begun with: its folder, its data."""

from __future__ import annotations

from PIL import Image

from mixmae.data.prepare import open_for_training


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
