"""Image files in folders and in lists: which are read, in which split, of which class."""

from __future__ import annotations

import pytest

from mixmae.data.source import DataError
from mixmae.data.sources import layout_of, list_splits, open_source
from tests.factories import all_samples


def test_a_flat_folder(write_files):
    folder = write_files(*(f"{i:03d}.jpg" for i in range(150)))
    source = open_source(folder)
    assert list(source.chunk_sizes) == [64, 64, 22]
    assert not source.has_labels
    assert layout_of(folder) == "files"


def test_classes_and_splits_of_folders(write_files):
    folder = write_files(*(f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ba" for i in range(3)))
    assert list_splits(folder) == ("train", "validation")
    held_out = open_source(folder, "validation")
    assert held_out.class_names == ("a", "b")
    assert [(sample.path, sample.label) for sample in all_samples(held_out)][2:4] == [
        ("val/a/2.png", 0),
        ("val/b/0.png", 1),
    ]


def test_a_dev_folder_is_a_validation_split(write_files):
    folder = write_files("train/a/1.jpg", "train/b/2.jpg", "dev/a/3.jpg", "dev/b/4.jpg")
    assert list_splits(folder) == ("train", "validation")
    assert [sample.path for sample in all_samples(open_source(folder, "validation"))] == [
        "dev/a/3.jpg",
        "dev/b/4.jpg",
    ]
    both = write_files("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg", "dev/a/5.jpg", below="both")
    assert [sample.path for sample in all_samples(open_source(both, "validation"))] == [
        "val/a/3.jpg",
        "val/b/4.jpg",
    ]


def test_paths_and_numbers(write_files, make_jpeg, tmp_path):
    folder = write_files("a.jpg", "b c.jpg", below="elsewhere")
    names = tmp_path / "list.txt"
    names.write_text(f"# mine\nelsewhere/b c.jpg\t4\n\n{folder}/a.jpg\n")
    source = open_source(names)
    assert [(sample.data, sample.label) for sample in all_samples(source)] == [
        (make_jpeg(1), 4),
        (make_jpeg(0), -1),
    ]
    assert source.where(1) == f"{folder}/a.jpg"
    assert source.class_names is None
    assert layout_of(names) == "list"


def test_class_names(write_files, tmp_path):
    write_files("a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "list.tsv").write_text("photos/a.jpg\temu\nphotos/b.jpg\tcat\nphotos/c.jpg\n")
    source = open_source(tmp_path / "list.tsv")
    assert source.class_names == ("cat", "emu")
    assert [sample.label for sample in all_samples(source)] == [1, 0, -1]


def test_bad_lists(write_files, tmp_path):
    write_files("a.jpg")
    names = tmp_path / "list.txt"
    names.write_text("photos/a.jpg\nphotos/b.jpg\n")
    with pytest.raises(DataError, match=r"1 of the 2 files in .* do not exist, such as photos/b.jpg in line 2"):
        open_source(names)
    names.write_text("\n")
    with pytest.raises(DataError, match="names no file"):
        open_source(names)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be text in UTF-8"):
        open_source(names)
