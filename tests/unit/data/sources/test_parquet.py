"""Parquet as users have it, whole and damaged; needs pyarrow."""

from __future__ import annotations

import json
import pickle

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


LABELS = [row % 4 for row in range(12)]
CLASSES = ("class0", "class1", "class2", "class3")


@pytest.mark.parametrize(
    ("column", "labels", "class_names"),
    [
        (pa.array([float("nan") if row == 9 else float(row % 4) for row in range(12)]), [*LABELS[:9], -1, 2, 3], None),
        (pa.array([None if row == 9 else float(row % 4) for row in range(12)]), [*LABELS[:9], -1, 2, 3], None),
        (pa.array([f"class{label}" for label in LABELS]), LABELS, CLASSES),
        (pa.array([f"class{label}" for label in LABELS]).dictionary_encode(), LABELS, CLASSES),
        (pa.array([f"class{label}" for label in LABELS], pa.large_string()), LABELS, CLASSES),
        (pa.array([str(label) for label in LABELS]), LABELS, None),
        (pa.array(LABELS).dictionary_encode(), LABELS, None),
        (pa.array([label == 2 for label in LABELS]), [int(label == 2) for label in LABELS], ("false", "true")),
        (pa.array(LABELS, pa.uint8()), LABELS, None),
        (pa.array([*LABELS[:9], 2**64 - 1, 2, 3], pa.uint64()), [*LABELS[:9], -1, 2, 3], None),
    ],
)  # fmt: skip
def test_label_columns_of_any_type(tmp_path, make_jpeg, column, labels, class_names):
    images = pa.array([{"bytes": make_jpeg(row), "path": f"{row}.jpg"} for row in range(12)])
    pq.write_table(pa.table({"image": images, "label": column}), tmp_path / "train-0.parquet", row_group_size=5)
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert [sample.label for sample in all_samples(source)] == labels
    assert source.read_labels().tolist() == labels
    assert source.class_names == class_names
    assert source.has_labels


def test_names_of_classes_are_numbered_over_all_files_and_splits(tmp_path, make_jpeg):
    for split, names in (("train", ["dog", "emu"]), ("train2", ["dog", None]), ("val", ["cat", "emu"])):
        columns = {"image": [make_jpeg(0), make_jpeg(1)], "label": names}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    assert open_source(tmp_path).read_labels().tolist() == [1, 2, 1, -1]
    assert open_source(tmp_path, "validation").read_labels().tolist() == [0, 2]
    assert open_source(tmp_path, "validation").class_names == ("cat", "dog", "emu")


@pytest.mark.parametrize(
    ("column", "note"),
    [
        (
            pa.array([[0], [1, 2], [1]]),
            "columns of labels cannot be read, 'label' of type list<element: int64>: 1 (train.parquet); store a number",
        ),
        (
            pa.array([0.5, 1.0, 2.0]),
            "values of the column 'label' are no whole numbers, and their images have no class: 1 (0.5); number the",
        ),
    ],
)
def test_label_columns_that_cannot_be_read_are_named(tmp_path, make_jpeg, column, note):
    pq.write_table(
        pa.table({"image": [make_jpeg(row) for row in range(3)], "label": column}), tmp_path / "train.parquet"
    )
    (met,) = open_source(tmp_path).met
    assert str(met.notes[0]).replace(f"{tmp_path}/", "").startswith(note)


def test_image_columns_of_two_types_in_one_folder(tmp_path, make_jpeg):
    first = pa.table(
        {"image": [{"bytes": make_jpeg(row), "path": f"{row}.jpg"} for row in range(3)], "label": [0, 1, 2]}
    )
    second = pa.table({"image": [make_jpeg(row) for row in (3, 4)], "label": pa.array([1, 0], pa.int32())})
    pq.write_table(first, tmp_path / "train-0.parquet")
    pq.write_table(second, tmp_path / "train-1.parquet")
    source = open_source(tmp_path)
    assert [(sample.data, sample.label) for sample in all_samples(source)] == [
        (make_jpeg(row), label) for row, label in enumerate((0, 1, 2, 1, 0))
    ]
    for column, message in (
        ({"image": ["a.jpg"], "label": [0]}, r"'image' of .*train-2\.parquet is string, which holds no image files"),
        ({"image": [make_jpeg(0)], "label": ["cat"]}, r"'label' of .*train-2\.parquet is string, and in train-0\.parq"),
    ):
        pq.write_table(pa.table(column), tmp_path / "train-2.parquet")
        with pytest.raises(DataError, match=message):
            open_source(tmp_path)


def test_images_that_are_only_named(tmp_path, make_jpeg):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    only_paths = pa.array([{"bytes": None, "path": f"/data/{row}.jpg"} for row in range(4)], struct)
    pq.write_table(pa.table({"image": only_paths, "label": [0, 1, 0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(
        DataError, match=r"the images are not in .*train\.parquet: the column 'image' holds only their pat"
    ):
        open_source(tmp_path)
    some = pa.array([{"bytes": make_jpeg(0), "path": "0.jpg"}, None], struct)
    pq.write_table(pa.table({"image": some}), tmp_path / "train.parquet")
    assert [str(note) for note in open_source(tmp_path).met[0].notes] == [
        "rows have no image: 1 (one in the column 'image'); store its bytes"
    ]
