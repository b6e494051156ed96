"""What a user names as data, as the two sources of a run."""

from __future__ import annotations

from pathlib import Path

from mixmae.data.prepare import _folder_name, open_for_training


def test_a_folder_of_images_becomes_shards_once(tmp_path, make_jpeg):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        (photos / f"{number}.jpg").write_bytes(make_jpeg(number))
    train, held_out = open_for_training(str(photos), tmp_path / "data", 1000)
    assert (train.num_rows, held_out.num_rows) == (32, 8)
    assert train.exact_reads
    (shards,) = (tmp_path / "data").iterdir()
    written = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert open_for_training(str(photos), tmp_path / "data", 1000)[0].digest == train.digest
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == written
    (photos / "40.jpg").write_bytes(make_jpeg(40))
    assert open_for_training(str(photos), tmp_path / "data", 1000)[0].num_rows == 33


def test_shards_are_opened_as_they_are(tmp_path, write_shards):
    train, held_out = open_for_training(str(write_shards(50)), tmp_path / "data", 1000)
    assert (train.num_rows, held_out.num_rows) == (45, 5)
    assert not (tmp_path / "data").exists()


def test_the_name_of_a_folders_shards_never_changes():
    assert _folder_name(Path("/pictures/photos")) == "photos-0527e1"
