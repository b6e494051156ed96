"""Parquet as users have it, whole and damaged; needs pyarrow."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.source import DataError
from mixmae.data.sources import open_source
from tests.factories import all_samples


def test_row_groups_are_chunks_and_rows_are_named(write_shards):
    folder = write_shards(150, 30)
    source = open_source(folder)
    assert list(source.chunk_sizes) == [64, 64, 22, 30]
    assert source.name == "shards/train"
    assert source.where(155) == f"{folder}/train-00001-of-00002.parquet#5 / photos/155.jpg"


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
    assert source.read_labels().tolist() == [sample.label for sample in all_samples(source)]
    assert source.class_names is None


def test_labels_of_minus_one_are_no_labels(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(row), "path": "x.jpg"} for row in range(3)])
    pq.write_table(pa.table({"image": files, "label": pa.array([-1] * 3)}), tmp_path / "test-0.parquet")
    assert not open_source(tmp_path, "test").has_labels


def test_a_missing_image_reads_as_an_empty_file(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(0), "path": "a.jpg"}, None, {"bytes": None, "path": "c.jpg"}])
    pq.write_table(pa.table({"image": files}), tmp_path / "train.parquet")
    assert [len(sample.data) > 0 for sample in all_samples(open_source(tmp_path))] == [True, False, False]


def test_strange_metadata_is_no_obstacle(tmp_path, make_jpeg):
    files = pa.array([{"bytes": make_jpeg(0), "path": "a.jpg"}])
    for metadata, expected in [
        (b"not json", None),
        (json.dumps({"info": {"features": {"label": {"names": {"1": "b", "0": "a"}}}}}), ("a", "b")),
    ]:
        table = pa.table({"image": files, "label": [0]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / "train.parquet")
        assert open_source(tmp_path).class_names == expected


def test_row_groups_of_a_file_that_was_written_again_are_read_again(tmp_path):
    def write(tag: bytes) -> None:
        table = pa.table({"image": [tag + bytes([row]) for row in range(20)]})
        pq.write_table(table, tmp_path / "new", row_group_size=10)
        (tmp_path / "new").replace(tmp_path / "train.parquet")

    for tag in (b"first", b"again"):  # of the same size: only the file's times and number tell
        write(tag)
        source = open_source(tmp_path)
        assert [source.read(chunk, [3])[0].data[:5] for chunk in (0, 1)] == [tag, tag]


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.4, 0.99])
def test_truncated_file_is_named(write_shards, kept_share):
    folder = write_shards(20, 20)
    file = folder / "train-00001-of-00002.parquet"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept_share)])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet is (truncated|not a Parquet file)"):
        open_source(folder)


def test_a_file_with_its_middle_missing(write_shards):
    folder = write_shards(200)
    file = folder / "train-00000-of-00001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:2000] + data[-4000:])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet"):
        open_source(folder)


def test_a_damaged_footer(write_shards):
    folder = write_shards(20)
    file = folder / "train-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = bytes(length)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"footer of .*train-00000-of-00001.parquet is damaged"):
        open_source(folder)


def test_no_image_column(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no image column: it holds text \(string\), label \(int64\)"):
        open_source(tmp_path)


def test_columns_that_change_between_files(write_shards):
    folder = write_shards(5)
    pq.write_table(pa.table({"text": ["a"]}), folder / "train-extra.parquet")
    with pytest.raises(DataError, match=r"train-extra\.parquet has no column 'image'"):
        open_source(folder)


def test_no_rows(write_shards):
    with pytest.raises(DataError, match="hold no rows"):
        open_source(write_shards(0))
