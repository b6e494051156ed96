"""What a user may name as data: paths, globs, URIs, lists of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmae.data.source import DataError
from mixmae.data.sources import list_splits, open_source


def test_globs_of_images(write_files):
    folder = write_files("a/1.jpg", "a/2.png", "b/3.jpg", "b/c/4.jpg", "b/notes.md")
    assert open_source(folder / "*" / "*.jpg").num_rows == 2
    assert open_source(f"{folder}/**/*.jpg").num_rows == 3
    assert open_source(f"{folder}/{{a,b}}/*.jpg").class_names == ("a", "b")
    assert open_source(f"{folder}/?/").num_rows == 4  # folders: what is in them
    with pytest.raises(DataError, match=r"nothing matches .*/\*.webp"):
        open_source(f"{folder}/*.webp")


def test_globs_of_shards(write_shards, tmp_path, write_files):
    folder = write_shards(10, 20, 30)
    assert open_source(f"{folder}/train-*.parquet").num_rows == 60
    braces = open_source(f"{folder}/train-{{00000..00001}}-of-00003.parquet")
    assert braces.num_rows == 30
    assert braces.exact_reads
    with pytest.raises(DataError, match=r"nothing matches .*train-00003-of"):
        open_source(f"{folder}/train-{{00000..00003}}-of-00003.parquet")
    write_files("a.jpg", below="shards")
    with pytest.raises(DataError, match=r"matches files of several sources \(files, parquet\)"):
        open_source(f"{folder}/*")


def test_a_name_with_brackets_is_a_name(write_files):
    assert open_source(write_files("1.jpg", below="photos [2019]")).num_rows == 1


def test_file_uris(write_files, write_shards):
    folder = write_files("a b.jpg", "c.jpg")
    assert open_source(folder.as_uri()).num_rows == 2
    assert open_source(write_shards(12).as_uri()).where(3).startswith("/")
    with pytest.raises(DataError, match="such as s3://bucket/prefix"):
        open_source("nope://bucket/x")


def test_a_list_in_a_file(write_files, write_shards, tmp_path):
    write_files("1.jpg", "2.jpg")
    write_shards(6)
    write_shards(4, split="validation")
    (tmp_path / "mix.json").write_text(json.dumps(["photos", {"source": "shards", "weight": 2}]))
    assert open_source(tmp_path / "mix.json").num_rows == 14
    assert list_splits(tmp_path / "mix.json") == ("train", "validation")
    assert open_source(tmp_path / "mix.json", "validation").num_rows == 4  # weights are for training
    for content in ("{", '{"a": 1}', "[1]", '[{"weight": 2}]'):
        (tmp_path / "mix.json").write_text(content)
        with pytest.raises(DataError, match="is not a list of sources: it must be JSON"):
            open_source(tmp_path / "mix.json")


def test_nothing_there(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image in"):
        open_source(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match="not Parquet"):
        open_source(tmp_path / "notes.md")
