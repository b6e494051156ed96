"""Digests follow the contents of files, and files that change under a run are noticed."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.blocks import eval_batches, load_block
from mixmae.data.broken import find_broken
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import read_rows
from mixmae.data.sources import contents, open_source
from tests.factories import all_samples, write_tar


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes of the same length, with the old times."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tar_of(path: Path, make_jpeg, shift: int) -> Path:
    members = [[(f"{i}.jpg", make_jpeg(i)), (f"{i}.cls", b"%d" % ((i + shift) % 4))] for i in range(20)]
    return write_tar(path, [member for pair in members for member in pair])


def test_four_tars_of_one_name_and_size(tmp_path, make_jpeg):
    digests = set()
    for shift in range(4):
        path = tar_of(tmp_path / str(shift) / "train-0.tar", make_jpeg, shift)
        digests.add(open_source(path).digest)
        assert path.stat().st_size == (tmp_path / "0" / "train-0.tar").stat().st_size
    assert len(digests) == 4
    assert open_source(tar_of(tmp_path / "again" / "train-0.tar", make_jpeg, 2)).digest in digests


def test_shards_follow_labels_that_were_corrected_in_place(tmp_path, make_jpeg):
    path = tar_of(tmp_path / "set" / "train-0.tar", make_jpeg, 0)
    after = tar_of(tmp_path / "after.tar", make_jpeg, 1)

    def pack() -> tuple[bool, dict[str, int]]:
        made = make_shards(path.parent, tmp_path / "out", overwrite=True, report=lambda line: None)
        samples = [*all_samples(open_source(made.folder)), *all_samples(open_source(made.folder, "validation"))]
        return made.made, {sample.path: sample.label for sample in samples}

    assert pack() == (True, {f"{i}.jpg": i % 4 for i in range(20)})
    assert not pack()[0]
    overwrite(path, after.read_bytes())
    assert pack() == (True, {f"{i}.jpg": (i + 1) % 4 for i in range(20)})


def test_files_and_parquet_of_the_same_size_and_time(tmp_path, write_files, make_jpeg):
    folder = write_files("a/1.jpg", "b/2.jpg")
    before = open_source(folder).digest
    path = folder / "a" / "1.jpg"
    overwrite(path, path.read_bytes()[:-3] + b"\0\xff\xd9")
    assert open_source(folder).digest != before
    table = tmp_path / "train.parquet"
    digests = []
    for label in (0, 1):
        pq.write_table(pa.table({"image": [make_jpeg(0)], "label": [label]}), table)
        digests.append(open_source(table).digest)
    assert digests[0] != digests[1]


def test_classes_count_too(write_files):
    folder = write_files("a/1.jpg", "b/2.jpg")
    before = open_source(folder).digest
    (folder / "b").rename(folder / "c")
    assert open_source(folder).digest != before


def test_a_file_is_hashed_once(write_files, monkeypatch):
    folder = write_files("a/1.jpg", "b/2.jpg", "b/3.jpg")
    hashed = []
    honest = contents.file_digest
    monkeypatch.setattr(contents, "file_digest", lambda path: hashed.append(path) or honest(path))
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    first = open_source(folder).digest
    assert sorted(hashed) == [str(folder / name) for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg")]
    time.sleep(0.02)  # beyond the clock's tick
    assert open_source(folder).digest == first
    assert len(hashed) == 3
    overwrite(folder / "b" / "2.jpg", (folder / "b" / "2.jpg").read_bytes()[::-1])
    assert open_source(folder).digest != first
    assert hashed[3:] == [str(folder / "b" / "2.jpg")]


def test_shards_are_known_by_their_manifest(tmp_path, write_files, monkeypatch):
    made = make_shards(write_files(*(f"{i}.jpg" for i in range(20))), tmp_path / "out", report=lambda line: None)
    first = open_source(made.folder).digest
    hashed = []
    honest = contents.file_digest
    monkeypatch.setattr(contents, "file_digest", lambda path: hashed.append(path) or honest(path))
    assert open_source(made.folder).digest == first
    assert not hashed
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(made.folder.glob("[!.]*")):  # the manifest first
        (copy / path.name).write_bytes(path.read_bytes())
        time.sleep(0.01)
    assert open_source(copy).digest == first
    assert len(hashed) == 1


@pytest.mark.parametrize("kind", ["files", "tar", "parquet", "shards"])
@pytest.mark.parametrize("known", [True, False])
def test_what_changes_after_it_was_opened(tmp_path, make_jpeg, write_shards, kind, known):
    """Rows of a file with other contents are named as such; one that was only touched is read as before."""
    if kind == "shards":
        path = write_shards(8) / "train-00000-of-00001.parquet"
    elif kind == "parquet":
        path = tmp_path / "train.parquet"
        pq.write_table(pa.table({"image": [make_jpeg(i) for i in range(8)]}), path)
    elif kind == "tar":
        path = write_tar(tmp_path / "train.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(8)])
    else:
        path = tmp_path / "photos" / "0.jpg"
        path.parent.mkdir()
        for number in range(8):
            (path.parent / f"{number}.jpg").write_bytes(make_jpeg(number))
    source = open_source(path.parent if kind in ("files", "shards") else path)
    if known:
        assert source.digest
    source = pickle.loads(pickle.dumps(source))
    original = path.read_bytes()
    path.write_bytes(original)  # only touched
    os.utime(path, ns=(1, 1))
    if known:
        assert [sample.data for sample in read_rows(source, range(8))] == [make_jpeg(i) for i in range(8)]
    path.write_bytes(original[:700] + original[704:708] + original[704:])
    os.utime(path, ns=(2, 2))
    samples = read_rows(source, range(8))
    assert [sample.problem.endswith("has changed since it was opened") for sample in samples] == [
        kind != "files" or row == 0 for row in range(8)
    ]
    assert [sample.data for sample in samples[1:]] == [make_jpeg(i) if kind == "files" else b"" for i in range(1, 8)]
    assert all(path.name in sample.where for sample in samples[: 8 if kind != "files" else 1])


def test_the_reason_reaches_the_list_of_broken_images(write_files):
    folder = write_files(*(f"{number}.jpg" for number in range(8)))
    source = open_source(folder)
    (folder / "3.jpg").write_bytes((folder / "4.jpg").read_bytes())
    (folder / "5.jpg").unlink()
    rows = np.arange(8)
    block = load_block(source, AugmentConfig(image_size=16), rows, np.zeros_like(rows), seed=0)
    expected = {3: "the file has changed since it was opened", 5: "the file cannot be read: No such file or directory"}
    assert {record.row: record.reason for record in block.broken.values()} == expected
    (batch,) = eval_batches(source, 16, batch_size=8)
    assert {record.row: record.reason for record in batch.broken} == expected
    assert batch.rows.tolist() == [0, 1, 2, 4, 6, 7]
    assert {record.row: record.reason for record in find_broken(source, rows)} == expected
