"""Splits by name, and the rows that are held out where there is none."""

from __future__ import annotations

import pytest

from mixmae.data.source import DataError, RowRange, read_rows
from mixmae.data.sources import list_splits, open_source, open_train_and_held_out, split_holdout
from tests.factories import all_samples


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
