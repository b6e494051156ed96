"""Exact reads: with a sidecar, without one, and with one that is no longer true; restart offsets either way."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import read_rows
from mixmae.data.sources import open_source
from mixmae.data.sources.parquet import ParquetSource
from mixmae.data.sources.shard_index import INDEX_SUFFIX, load_index, write_arrow


def whole_groups(source: ParquetSource) -> ParquetSource:
    """The same source as if it had no sidecars."""
    return dataclasses.replace(source, stamps=(None,) * len(source.files))


@pytest.fixture
def folder(tmp_path, make_jpeg):
    """200 rows of all kinds in two shards: tiles, plain, empty, labels and none, long and repeated bytes."""
    random = np.random.default_rng(0)
    images = []
    for row in range(200):
        data = [make_jpeg(row), b"", random.bytes(300_000), bytes(70), b"x"][row % 5 if row % 7 else 0]
        restarts = np.arange(row % 9, dtype=np.uint32) * 1000 if row % 3 else None
        images.append(
            StoredImage(data, f"höfe/{row} 50%.jpg" if row % 2 else "", row % 4 - 1, restart_offsets=restarts)
        )
    for number in range(2):
        part = images[number * 100 : (number + 1) * 100]
        write_shard(tmp_path / shard_name("train", number, 2), part, shard_schema(list("abc")))
    return tmp_path


def assert_same(source, other):
    for one, two in zip(*(read_rows(each, range(each.num_rows)) for each in (source, other)), strict=True):
        assert one == two
        assert (one.restart_offsets is None) == (two.restart_offsets is None)
        if one.restart_offsets is not None:
            assert one.restart_offsets.dtype == np.uint32
            assert np.array_equal(one.restart_offsets, two.restart_offsets)


def test_both_ways_of_reading_give_the_same(folder):
    source = pickle.loads(pickle.dumps(open_source(folder)))
    assert source.exact_reads
    assert not whole_groups(source).exact_reads
    assert_same(source, whole_groups(source))
    samples = source.read(1, [5, 2, 5])
    assert samples[0] == samples[2]
    assert samples[1].path == "" or samples[1].path.startswith("höfe/")
    assert source.read(0, [4])[0].restart_offsets.tolist() == [0, 1000, 2000, 3000]
    assert source.where(101) == f"{folder}/train-00001-of-00002.parquet#1 / höfe/101 50%.jpg"


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "of another shard", "garbage", *range(5)])
def test_without_a_true_sidecar_row_groups_are_read(folder, damage):
    reference = open_source(folder)
    read_rows(reference, range(200))  # the sidecars are in memory now
    first, second = (folder / f"train-0000{n}-of-00002{INDEX_SUFFIX}" for n in range(2))
    data = first.read_bytes()
    first.unlink()
    if damage != "missing":
        contents = {"empty": b"", "cut": data[:-40], "of another shard": second.read_bytes(), "garbage": data[::-1]}
        first.write_bytes(contents[damage] if damage in contents else with_another_value(data, damage))
    source = open_source(folder)
    assert [stamp is None for stamp in source.stamps] == [True, False]
    assert not source.exact_reads
    assert_same(source, reference)
    said = [note for met in source.met for note in met.notes if "sidecars" in note.what]
    assert [note.example for note in said] == ([] if damage == "missing" else [first.name])


def with_another_value(sidecar: bytes, column: int) -> bytes:
    """A sidecar with one bit of a column's values flipped."""
    table = pa.ipc.open_file(pa.BufferReader(sidecar)).read_all()
    chunk = table.column(column).chunk(0)
    values = chunk.buffers()[-1].to_pybytes()  # of strings and lists, what they hold
    at = sidecar.index(values)
    assert sidecar.count(values) == 1
    place = at + 8 * 50 if column < 3 else at + 3
    return sidecar[:place] + bytes([sidecar[place] ^ 1]) + sidecar[place + 1 :]


def test_damage_that_comes_while_it_is_used_and_sidecars_of_earlier_versions(folder):
    first = folder / f"train-00000-of-00002{INDEX_SUFFIX}"
    data = first.read_bytes()
    source = open_source(folder)
    expected = read_rows(whole_groups(source), range(200))
    first.write_bytes(with_another_value(data, 2))
    load_index.cache_clear()
    assert read_rows(source, range(200)) == expected
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    stamp = {b"shard": table.schema.metadata[b"shard"]}
    assert set(table.schema.metadata) > set(stamp)
    write_arrow(first, table.replace_schema_metadata(stamp))
    load_index.cache_clear()
    source = open_source(folder)
    assert source.exact_reads
    assert read_rows(source, range(200)) == expected


def test_a_shard_that_is_written_again_needs_its_own_sidecar(folder, make_jpeg):
    stale = (folder / f"train-00000-of-00002{INDEX_SUFFIX}").read_bytes()
    old = open_source(folder)
    old.read(0, [0])
    images = [StoredImage(make_jpeg(1000 + row), "", 0) for row in range(100)]
    write_shard(folder / shard_name("train", 0, 2), images, shard_schema(list("abc")))
    assert open_source(folder).read(0, [3])[0].data == make_jpeg(1003)
    assert {sample.problem.partition(" ")[2] for sample in old.read(0, range(64))} == {
        "has changed since it was opened"
    }
    (folder / f"train-00000-of-00002{INDEX_SUFFIX}").write_bytes(stale)
    assert open_source(folder).stamps[0] is None
    assert open_source(folder).read(0, [3])[0].data == make_jpeg(1003)


def test_compressed_shards_of_others_are_read_by_row_groups(folder):
    path = folder / shard_name("train", 0, 2)
    before = open_source(folder)
    samples = read_rows(before, range(100))
    pq.write_table(pq.read_table(path), path, compression="zstd", row_group_size=50)
    after = open_source(folder)
    assert after.stamps[0] is None
    assert read_rows(after, range(100)) == samples


def test_a_sidecar_that_goes_while_it_is_used(folder):
    expected = read_rows(whole_groups(open_source(folder)), range(200))
    source = open_source(folder)
    load_index.cache_clear()
    for sidecar in folder.glob(f"*{INDEX_SUFFIX}"):
        sidecar.unlink()
    assert read_rows(source, range(200)) == expected
