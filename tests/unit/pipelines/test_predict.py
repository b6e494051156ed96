"""Predictions for images without labels: the table, and what users get wrong."""

from __future__ import annotations

from pipelines import predict


def test_images_that_do_not_exist(error, tmp_path, classifier):
    assert "does not exist" in error(predict.main, classifier, tmp_path / "no")


def test_a_table_of_all_images(tmp_path, shards, classifier):
    data = shards("set", [row % 4 for row in range(40)])
    assert predict.main([str(classifier), str(data), "--output", str(tmp_path / "predicted")]) == 0
    lines = (tmp_path / "predicted" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 41
    assert lines[0] == "file,class,probability,top5"
    assert "train-0.parquet#0 / 0.jpg," in lines[1]
