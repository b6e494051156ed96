"""Classes of whole collections, read without their images, against what reading the images says."""

from __future__ import annotations

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.sources import open_source, split_holdout


def by_reading(source) -> list[int]:
    return [sample.label for chunk, rows in enumerate(source.chunk_sizes) for sample in source.read(chunk, range(rows))]


@pytest.fixture
def layouts(tmp_path, write_shards, make_jpeg):
    """One collection of each layout, by name."""
    shards = write_shards(70, 9)
    nulls = tmp_path / "nulls.parquet"
    images = [{"bytes": make_jpeg(row), "path": None} for row in range(4)]
    pq.write_table(pa.table({"image": images, "label": pa.array([2, None, 0, -1], pa.int16())}), nulls)
    unlabelled = tmp_path / "unlabelled.parquet"
    pq.write_table(pa.table({"image": images}), unlabelled)
    for row in range(5):
        place = tmp_path / "folders" / ("emu" if row % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.jpg").write_bytes(make_jpeg(row))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for row in range(4):
            members = {"jpg": make_jpeg(row), **({"cls": str(row % 2).encode()} if row else {})}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{row}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {
        "shards": shards,
        "nulls": nulls,
        "unlabelled": unlabelled,
        "folders": tmp_path / "folders",
        "tar": tmp_path / "set.tar",
        # Names in another order, so that labels are renumbered; a weight, so that some rows come again.
        "joined": [shards, (tmp_path / "folders", 1.4)],
    }


def test_they_are_what_reading_the_images_gives(layouts):
    for name, place in layouts.items():
        source = open_source(place)
        assert source.read_labels().tolist() == by_reading(source), name
    assert open_source(layouts["nulls"]).read_labels().tolist() == [2, -1, 0, -1]
    assert open_source(layouts["folders"]).read_labels().tolist() == [0, 0, 0, 1, 1]  # dog, emu
    assert open_source(layouts["joined"]).read_labels()[79:84].tolist() == [1, 1, 1, 2, 2]


def test_of_the_rows_that_are_held_out(layouts):
    train, heldout = split_holdout(open_source(layouts["shards"]), 10)
    assert train.read_labels().tolist() == by_reading(train)
    assert heldout.read_labels().tolist() == by_reading(heldout) == [row % 3 for row in range(69, 79)]
