"""What every source of images guarantees, whatever the layout; needs pyarrow."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixmae.data.order import Draw, hash64
from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import DataError, RowRange, Source, read_rows
from mixmae.data.sources import open_source
from mixmae.data.sources.shard_index import LENGTH_BYTES
from mixmae.data.sources.storage import Storage
from tests.factories import jpeg, write_tar

NUM_IMAGES = 150
"""In two files where the layout has files of many images; three chunks of single files."""
CLASSES = ("cat", "dog", "emu")


@dataclass(frozen=True)
class Image:
    data: bytes
    label: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a collection is written and what reading it must give."""

    write: Callable[[Path, list[Image]], None]
    """Writes the images, of which the labels and paths are this layout's, below a folder."""
    images: list[Image]
    """In storage order."""
    open: Callable[[Path], Source] = open_source
    class_names: tuple[str, ...] | None = None
    exact_reads: bool = True
    extra_bytes: int = 0
    """Per image that is read."""
    one_file_per_image: bool = False


def labelled(index: int) -> int:
    """Every seventh image has no class."""
    return -1 if index % 7 == 3 else index % 3


def halves(images: list[Image]) -> list[list[Image]]:
    return [images[:100], images[100:]]


def write_folders(root: Path, images: list[Image]) -> None:
    for image in images:
        (root / image.path).parent.mkdir(parents=True, exist_ok=True)
        (root / image.path).write_bytes(image.data)


def write_list(root: Path, images: list[Image]) -> None:
    write_folders(root, images)
    lines = [image.path + (f"\t{image.label}" if image.label >= 0 else "") for image in images]
    (root / "list.txt").write_text("\n".join(lines))


def write_tars(root: Path, images: list[Image]) -> None:
    for number, part in enumerate(halves(images)):
        members = []
        for image in part:
            members.append((image.path, image.data))
            if image.label >= 0:
                members.append((image.path.replace(".jpg", ".cls"), str(image.label).encode()))
        write_tar(root / f"train-{number}.tar", members)
    (root / "classes.txt").write_text("\n".join(CLASSES))


def write_parquet(root: Path, images: list[Image]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(halves(images)):
        column = pa.array([{"bytes": image.data, "path": image.path} for image in part])
        labels = pa.array([image.label if image.label >= 0 else None for image in part], pa.int16())
        table = pa.table({"image": column, "label": labels})
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=30)


def write_shards(root: Path, images: list[Image], class_names: tuple[str, ...] = CLASSES) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(halves(images)):
        stored = [StoredImage(image.data, image.path, image.label) for image in part]
        write_shard(root / shard_name("train", number, 2), stored, shard_schema(class_names))


FOLDERS = [Image(jpeg(i), i // 50, f"{CLASSES[i // 50]}/{i:03d} 50%.jpg") for i in range(NUM_IMAGES)]
OTHERS = [Image(jpeg(i), labelled(i), f"photos/{i:03d}.jpg") for i in range(NUM_IMAGES)]

JOINED_NAMES = ("emu", "cat", "dog")
"""The shards' classes in the joined layout: other numbers than those of the folders, which come first."""
SHARDS_IN_JOINED = [
    Image(jpeg(1000 + i), CLASSES.index(JOINED_NAMES[i % 3]), f"photos/{i:03d}.jpg") for i in range(NUM_IMAGES)
]


def write_joined(root: Path, images: list[Image]) -> None:
    write_folders(root / "folders", images[:NUM_IMAGES])
    own = [Image(image.data, JOINED_NAMES.index(CLASSES[image.label]), image.path) for image in images[-NUM_IMAGES:]]
    write_shards(root / "shards", own, JOINED_NAMES)


def open_joined(root: Path) -> Source:
    return open_source([(root / "folders", 2.4), root / "shards"])


THIRD_TIME = np.sort(np.argsort(hash64(Draw.SOURCES, 0, np.arange(NUM_IMAGES)), kind="stable")[:60])
"""0.4 of the folders' images, chosen by a hash of part and row."""
JOINED = 2 * FOLDERS + [FOLDERS[row] for row in THIRD_TIME] + SHARDS_IN_JOINED


LAYOUTS = {
    "folders": Layout(write=write_folders, images=FOLDERS, class_names=CLASSES, one_file_per_image=True),
    "list": Layout(
        write=write_list, images=OTHERS, open=lambda root: open_source(root / "list.txt"), one_file_per_image=True
    ),
    "tars": Layout(write=write_tars, images=OTHERS, class_names=CLASSES),
    "parquet": Layout(write=write_parquet, images=OTHERS, exact_reads=False),
    "shards": Layout(write=write_shards, images=OTHERS, class_names=CLASSES, extra_bytes=LENGTH_BYTES),
    "joined": Layout(
        write=write_joined,
        images=JOINED,
        open=open_joined,
        class_names=CLASSES,
        extra_bytes=LENGTH_BYTES,
        one_file_per_image=True,
    ),
}


@pytest.fixture(params=[*LAYOUTS, "rows of shards"])
def layout(request) -> Layout:
    if request.param in LAYOUTS:
        return LAYOUTS[request.param]
    base = LAYOUTS["shards"]
    return Layout(
        write=lambda root, images: base.write(root, OTHERS[:7] + images + OTHERS[140:]),
        images=OTHERS[7:140],
        open=lambda root: RowRange(base=open_source(root), start=7, stop=140),
        class_names=CLASSES,
        extra_bytes=LENGTH_BYTES,
    )


@pytest.fixture
def source(layout, tmp_path) -> Source:
    layout.write(tmp_path, layout.images)
    return layout.open(tmp_path)


def contents(source: Source) -> list[Image]:
    return [Image(sample.data, sample.label, sample.path) for sample in read_rows(source, range(source.num_rows))]


def test_every_row_is_what_was_stored(source, layout):
    assert contents(source) == layout.images
    assert source.num_rows == source.chunk_sizes.sum() == len(layout.images)
    assert source.class_names == layout.class_names
    assert source.has_labels


def test_rows_of_a_chunk_may_be_read_in_any_order(source):
    random = np.random.default_rng(0)
    for chunk, size in enumerate(source.chunk_sizes.tolist()):
        whole = source.read(chunk, range(size))
        rows = random.integers(0, size, 2 * size)  # some of them twice
        assert source.read(chunk, rows) == [whole[row] for row in rows]
        assert source.read(chunk, []) == []


def test_where_a_row_is_stored(source, layout, tmp_path):
    places = [source.where(row) for row in range(source.num_rows)]
    assert places == [sample.where for sample in read_rows(source, range(source.num_rows))]
    assert all(place.startswith(str(tmp_path)) for place in places)
    assert all(place.endswith(image.path) for place, image in zip(places, layout.images, strict=True))


def test_labels_are_those_of_the_samples(source, layout):
    labels = source.read_labels()
    assert labels.dtype == np.int64
    assert labels.tolist() == [image.label for image in layout.images]


def test_a_pickled_source_is_the_same(source):
    copy = pickle.loads(pickle.dumps(source))
    assert copy.digest == source.digest
    assert copy.name == source.name
    assert contents(copy) == contents(source)


def test_the_digest_follows_the_data(source, layout, tmp_path):
    assert layout.open(tmp_path).digest == source.digest
    first = layout.images[0]
    changed = Image(first.data + bytes(20_000), first.label, first.path)  # a tar is padded to 10 KB
    layout.write(tmp_path, [changed if image == first else image for image in layout.images])
    assert layout.open(tmp_path).digest != source.digest


def test_num_bytes_is_about_what_the_images_take(source, layout):
    total = sum(len(image.data) for image in layout.images)
    assert 0.8 * total < source.num_bytes < 1.2 * total  # Parquet of others is compressed


def test_exact_reads_fetch_no_more_than_was_asked_for(source, layout, monkeypatch):
    assert source.exact_reads == layout.exact_reads
    rows = [1, 20, 21, source.num_rows - 1]
    read_rows(source, rows)  # sidecars are in memory now
    fetched = []
    pread, read_file = os.pread, Storage.read_file

    def count(data: bytes) -> bytes:
        fetched.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", lambda *args: count(pread(*args)))
    monkeypatch.setattr(Storage, "read_file", lambda *args: count(read_file(*args)))
    wanted = sum(len(sample.data) for sample in read_rows(source, rows))
    if layout.exact_reads:
        assert wanted <= sum(fetched) <= wanted + layout.extra_bytes * len(rows)


def test_what_has_gone_since(source, layout, tmp_path):
    """A lost image file is an empty row with the reason; a lost shard or tar is an error."""
    (lost,) = read_rows(source, [0])
    path = Path(lost.where.split("#")[0].split(" / ")[0])
    path.unlink()
    if layout.one_file_per_image:
        first, second = read_rows(source, [0, 1])
        assert (first.data, first.label, first.path) == (b"", lost.label, lost.path)
        assert (first.where, first.problem[:39]) == (str(path), "the file cannot be read: No such file o")
        assert second.data == layout.images[1].data
    else:
        with pytest.raises(DataError, match=rf"{path.name} cannot be read any more .*was it moved or overwritten\?"):
            read_rows(source, [0])


def test_nothing_is_read_beyond_the_rows(source):
    """Each row is in one chunk, and chunks have no other rows."""
    chunks, within = source.chunks.locate(np.arange(source.num_rows))
    assert np.bincount(chunks, minlength=len(source.chunk_sizes)).tolist() == source.chunk_sizes.tolist()
    assert (within < source.chunk_sizes[chunks]).all()
