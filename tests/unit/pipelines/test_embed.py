"""Embeddings as a command: the library's numbers, whole files or none, and what users get wrong."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from mixmae.convert import digest_of, load_encoder
from mixmae.data.sources import open_source
from mixmae.inference import Embedder, load_frozen
from pipelines import embed
from tests.unit.conftest import coloured_jpeg
from tests.unit.pipelines.conftest import MEAN, library_features

LABELS = [row % 4 for row in range(60)]


@pytest.mark.usefixtures("no_cluster")
def test_mistakes(error, weights, shards, tmp_path):
    data = shards("set", LABELS, [0, 1])
    out = tmp_path / "out.parquet"
    assert "several splits" in error(embed.main, weights, "--data", data, "--output", out)
    out.write_text("mine")
    arguments = (weights, "--data", data, "--output", out, "--split", "train")
    assert "is there already" in error(embed.main, *arguments)
    assert "has no weights under ema" in error(embed.main, *arguments, "--overwrite", "--weights-key", "ema")
    assert "--workers is 0" in error(embed.main, *arguments, "--workers", 0)
    assert out.read_text() == "mine"
    below = (weights, "--data", data, "--output", out / "features")
    assert "cannot write to" in error(embed.main, *below)


def test_values_are_those_of_the_library_and_files_say_what_they_are(tmp_path, weights, shards, monkeypatch, capsys):
    monkeypatch.setattr(embed, "PART_ROWS", 25)  # three row groups
    data = shards("set", [*LABELS[:59], -1], broken=2)
    arguments = [str(weights), "--data", str(data), "--output", str(tmp_path / "out"), "--batch-size", "7"]
    assert embed.main(arguments) == 0
    file = tmp_path / "out" / "train.parquet"
    table = pq.read_table(file)
    read = table["feature"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    features, labels = library_features(weights, data, "train")
    np.testing.assert_allclose(read, features.numpy(), rtol=1e-4, atol=1e-5)
    assert table["row"].to_pylist() == list(range(2, 60))
    assert table["path"].to_pylist()[:2] == ["2.jpg", "3.jpg"]
    assert table["label"].to_pylist() == [*labels.tolist()[:57], None]
    assert pq.ParquetFile(file).num_row_groups == 3
    facts = json.loads(table.schema.metadata[b"mixmae"])
    assert facts["width"] == 128
    assert pq.read_metadata(file).metadata[b"mixmae.broken"] == b"2"
    assert facts["encoder_digest"] == digest_of(load_encoder(weights)[0].state_dict())
    assert facts["preprocessing"]["mean"] == list(MEAN)
    assert [item.name for item in file.parent.iterdir()] == ["train.parquet"]
    text = capsys.readouterr().out
    assert "left out: 2 of 60 images could not be used (" in text
    for row in range(2):
        assert f"train-0.parquet#{row} / {row}.jpg: not an image" in text


def test_broken_images_alone_give_no_file(error, tmp_path, weights, shards):
    data = shards("set", LABELS[:8], broken=8)
    text = error(embed.main, weights, "--data", data, "--output", tmp_path / "out")
    assert "no image of set/train could be decoded, for example " in text
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_files_keeps_their_names(tmp_path, weights):
    for name in ("a.jpg", "deep/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "photos" / name).write_bytes(coloured_jpeg(1, 0))
    out = tmp_path / "out.parquet"
    assert embed.main([str(weights), "--data", str(tmp_path / "photos"), "--output", str(out)]) == 0
    table = pq.read_table(out)
    assert table["path"].to_pylist() == ["a.jpg", "deep/b.jpg"]
    assert table["label"].null_count == 2


def test_nothing_is_left_of_one_that_fails(tmp_path, weights, shards, monkeypatch, error):
    monkeypatch.setattr(embed, "PART_ROWS", 25)
    frozen, source = load_frozen(weights), open_source(shards("set", LABELS))
    embedder, calls = Embedder(frozen, source), []

    def fails(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise OSError("the disk is full")
        return embedder(rows)

    monkeypatch.setattr(embed, "Embedder", lambda *_: fails)
    arguments = (weights, "--data", tmp_path / "set", "--output", tmp_path / "out")
    assert "the disk is full" in error(embed.main, *arguments)
    assert list((tmp_path / "out").iterdir()) == []
