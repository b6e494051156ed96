"""Shards as users have them, whole and damaged; needs pyarrow."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.source import DataError, RowRange, read_rows
from mixmae.data.sources import list_splits, open_source, open_train_and_held_out, split_holdout


def all_samples(source):
    return [sample for chunk, rows in enumerate(source.chunk_sizes) for sample in source.read(chunk, range(rows))]


def test_what_is_written_is_read(write_shards, make_jpeg):
    folder = write_shards(150, 30)
    source = pickle.loads(pickle.dumps(open_source(folder)))
    assert list(source.chunk_sizes) == [64, 64, 22, 30]
    assert source.class_names == ("cat", "dog", "emu")
    assert source.has_labels
    assert source.name == "shards/train"
    samples = all_samples(source)
    assert [sample.data for sample in samples] == [make_jpeg(row) for row in range(180)]
    assert [sample.label for sample in samples] == [row % 3 for row in range(180)]
    assert source.where(155) == f"{folder}/train-00001-of-00002.parquet#5 / photos/155.jpg"
    assert source.read(1, [5, 2])[0].data == make_jpeg(69)


def test_the_digest_follows_the_data(write_shards, tmp_path):
    first = open_source(write_shards(20)).digest
    assert open_source(tmp_path / "shards").digest == first
    assert open_source(write_shards(21)).digest != first


def test_splits_are_told_by_file_names(write_shards, tmp_path):
    folder = write_shards(12)
    write_shards(9, split="validation")
    assert list_splits(folder) == ("train", "validation")
    assert open_source(folder, "validation").num_rows == 9
    with pytest.raises(DataError, match="no test split, only train, validation"):
        open_source(folder, "test")
    with pytest.raises(DataError, match="no split called 'tset'"):
        open_source(folder, "tset")
    train, held_out = open_train_and_held_out(folder)
    assert (train.num_rows, held_out.num_rows) == (12, 9)


@pytest.mark.parametrize("name", ["0000.parquet", "pictures.parquet"])
def test_a_file_without_a_split_in_its_name_is_training_data(write_shards, name):
    folder = write_shards(30)
    (folder / "train-00000-of-00001.parquet").rename(folder / name)
    assert list_splits(folder) == ("train",)
    train, held_out = open_train_and_held_out(folder)
    assert (train.num_rows, held_out.num_rows) == (27, 3)
    assert open_source(folder / name).num_rows == 30


def test_folders_may_name_the_split(write_shards, tmp_path):
    folder = write_shards(8)
    nested = tmp_path / "hub" / "default" / "validation"
    nested.mkdir(parents=True)
    (folder / "train-00000-of-00001.parquet").rename(nested / "0000.parquet")
    assert list_splits(tmp_path / "hub") == ("validation",)


@pytest.mark.parametrize(
    ("image", "label", "as_struct"),
    [
        ("image", "label", True),
        ("img", "fine_label", True),
        ("photo", "labels", True),
        ("jpg", "cls", False),
        ("image", None, False),
    ],
)
def test_column_variants(tmp_path, make_jpeg, image, label, as_struct):
    files = [make_jpeg(row) for row in range(10)]
    columns = {image: pa.array([{"bytes": data, "path": None} for data in files] if as_struct else files)}
    columns["other"] = pa.array(["text"] * 10)
    if label:
        columns[label] = pa.array([row % 2 for row in range(10)], type=pa.int32())
    pq.write_table(pa.table(columns), tmp_path / "part.parquet", row_group_size=4)
    source = open_source(tmp_path)
    assert list(source.chunk_sizes) == [4, 4, 2]
    assert [sample.data for sample in all_samples(source)] == files
    assert [sample.label for sample in all_samples(source)] == ([0, 1] * 5 if label else [-1] * 10)
    assert source.has_labels == bool(label)
    assert source.class_names is None


def test_labels_of_minus_one_are_no_labels(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(row), "path": "x.jpg"} for row in range(3)])
    pq.write_table(pa.table({"image": files, "label": pa.array([-1] * 3)}), tmp_path / "test-0.parquet")
    assert not open_source(tmp_path, "test").has_labels


def test_a_missing_image_reads_as_an_empty_file(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(0), "path": "a.jpg"}, None, {"bytes": None, "path": "c.jpg"}])
    pq.write_table(pa.table({"image": files}), tmp_path / "train.parquet")
    assert [len(sample.data) > 0 for sample in all_samples(open_source(tmp_path))] == [True, False, False]


def test_holdout_takes_the_last_rows(write_shards, make_jpeg):
    source = open_source(write_shards(150, 30))
    train, held_out = split_holdout(source, 40)
    assert list(train.chunk_sizes) == [64, 64, 12]
    assert list(held_out.chunk_sizes) == [10, 30]
    assert [sample.data for sample in all_samples(train)] == [make_jpeg(row) for row in range(140)]
    assert [sample.data for sample in all_samples(held_out)] == [make_jpeg(row) for row in range(140, 180)]
    assert held_out.where(0).endswith("photos/140.jpg")
    assert read_rows(held_out, [11])[0].data == make_jpeg(151)
    assert len({source.digest, train.digest, held_out.digest}) == 3
    inner = RowRange(base=held_out, start=5, stop=12)
    assert [sample.data for sample in all_samples(inner)] == [make_jpeg(row) for row in range(145, 152)]
    for wrong in (0, 180):
        with pytest.raises(DataError, match="cannot hold out"):
            split_holdout(source, wrong)


class TestBadInput:
    def test_nothing_there(self, tmp_path: Path):
        with pytest.raises(DataError, match="does not exist"):
            open_source(tmp_path / "nowhere")
        with pytest.raises(DataError, match="no image in"):
            open_source(tmp_path)
        (tmp_path / "notes.md").write_text("hello")
        with pytest.raises(DataError, match="not Parquet"):
            open_source(tmp_path / "notes.md")

    @pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.4, 0.99])
    def test_truncated_file_is_named(self, write_shards, kept_share):
        folder = write_shards(20, 20)
        file = folder / "train-00001-of-00002.parquet"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * kept_share)])
        with pytest.raises(DataError, match=r"train-00001-of-00002.parquet is (truncated|not a Parquet file)"):
            open_source(folder)

    def test_a_file_with_its_middle_missing(self, write_shards):
        folder = write_shards(200)
        file = folder / "train-00000-of-00001.parquet"
        data = file.read_bytes()
        file.write_bytes(data[:2000] + data[-4000:])
        with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet"):
            open_source(folder)

    def test_a_damaged_footer(self, write_shards):
        folder = write_shards(20)
        file = folder / "train-00000-of-00001.parquet"
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[-8:-4], "little")
        data[-8 - length : -8] = bytes(length)
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"footer of .*train-00000-of-00001.parquet is damaged"):
            open_source(folder)

    def test_no_image_column(self, tmp_path):
        pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
        with pytest.raises(DataError, match=r"no image column: it holds text \(string\), label \(int64\)"):
            open_source(tmp_path)

    def test_columns_that_change_between_files(self, write_shards):
        folder = write_shards(5)
        pq.write_table(pa.table({"text": ["a"]}), folder / "train-extra.parquet")
        with pytest.raises(DataError, match=r"train-extra\.parquet has no column 'image'"):
            open_source(folder)

    def test_no_rows(self, write_shards):
        with pytest.raises(DataError, match="hold no rows"):
            open_source(write_shards(0))


def test_strange_metadata_is_no_obstacle(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(0), "path": "a.jpg"}])
    for metadata, expected in [
        (b"not json", None),
        (json.dumps({"info": {"features": {"label": {"names": {"1": "b", "0": "a"}}}}}), ("a", "b")),
    ]:
        table = pa.table({"image": files, "label": [0]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / "train.parquet")
        assert open_source(tmp_path).class_names == expected
