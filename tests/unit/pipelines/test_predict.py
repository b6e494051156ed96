"""Predictions for images without labels: the table, and what users get wrong."""

from __future__ import annotations

import csv

from PIL import Image

from pipelines import predict
from pipelines.stats import CELL_PX


def test_images_that_do_not_exist(error, tmp_path, classifier):
    assert "does not exist" in error(predict.main, classifier, tmp_path / "no")


def test_a_table_of_all_images(tmp_path, shards, classifier):
    data = shards("set", [row % 4 for row in range(40)])
    assert predict.main([str(classifier), str(data), "--output", str(tmp_path / "predicted")]) == 0
    lines = (tmp_path / "predicted" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 41
    assert lines[0] == "file,class,probability,top5,problem"
    assert "train-0.parquet#0 / 0.jpg," in lines[1]


def test_broken_images_get_no_class_and_are_named(tmp_path, shards, classifier, capsys):
    data = shards("set", [row % 4 for row in range(10)], broken=4)
    assert predict.main([str(classifier), str(data), "--output", str(tmp_path / "predicted")]) == 0
    with (tmp_path / "predicted" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"].rpartition("/")[2] for row in rows] == [f" {number}.jpg" for number in range(10)]
    for row in rows[:4]:
        assert (row["class"], row["probability"], row["top5"]) == ("", "", "")
        assert row["problem"].startswith("not an image")
    assert all(row["class"] in "0123" and row["class"] and row["problem"] == "" for row in rows[4:])
    picture = Image.open(tmp_path / "predicted" / "predictions.png")
    assert picture.width == 6 * CELL_PX  # the six whole ones
    text = capsys.readouterr().out
    assert "predictions.csv (10 images)" in text
    assert "no class: 4 of 10 images could not be used (" in text
    assert "0.jpg: not an image" in text
    assert text.strip().endswith("; and 1 more)")


def test_broken_images_alone_are_refused(error, tmp_path, shards, classifier):
    data = shards("set", [0, 1, 2], broken=3)
    text = error(predict.main, classifier, data, "--output", tmp_path / "predicted")
    assert "no image of set/train could be decoded, for example " in text
    assert list((tmp_path / "predicted").iterdir()) == []
