"""Evaluating a classifier: what it writes, and what users get wrong."""

from __future__ import annotations

import json

from mixmae.convert import Preprocessing, save_encoder
from pipelines import evaluate
from tests.factories import tiny_swin

LABELS = [row % 4 for row in range(40)]


def test_mistakes(error, tmp_path, shards, classifier):
    def refused(*argv: object) -> str:
        return error(evaluate.main, *argv)

    save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
    assert "without a classifier" in refused(tmp_path / "encoder.safetensors", "--data", shards("a", LABELS))
    assert "--data SOURCE" in refused(classifier)
    assert "has no weights under ema" in refused(classifier, "--weights-key", "ema")
    assert "no labels to judge by" in refused(classifier, "--data", shards("b", None))
    text = refused(classifier, "--data", shards("c", [*LABELS, 4]))
    assert "has the label 4, but the model knows 4 classes" in text
    assert "--batch-size is 0" in refused(classifier, "--data", tmp_path / "a", "--batch-size", 0)
    assert "--crop-pct is 2" in refused(classifier, "--data", tmp_path / "a", "--resize-share", 2)
    assert "does not exist" in refused(tmp_path / "no", "--data", tmp_path / "a")


def test_a_file_is_judged(tmp_path, shards, classifier):
    data = shards("set", LABELS)
    assert evaluate.main([str(classifier), "--data", str(data), "--output", str(tmp_path / "judged")]) == 0
    numbers = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert numbers["num_judged"] == 40
    assert numbers["top5"] == 1.0  # of four classes
    assert {item.name for item in (tmp_path / "judged").iterdir()} == {
        *("metrics.json", "classes.csv", "confusions.png", "calibration.png")
    }


def test_broken_images_are_named_and_in_no_figure(tmp_path, shards, classifier, capsys, error):
    data = shards("set", [*LABELS[:39], -1], broken=3)
    assert evaluate.main([str(classifier), "--data", str(data), "--output", str(tmp_path / "judged")]) == 0
    numbers = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert (numbers["num_judged"], numbers["num_unknown"], numbers["num_broken"]) == (36, 1, 3)
    table = (tmp_path / "judged" / "classes.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[2]) for line in table] == [9, 9, 9, 9]
    text = capsys.readouterr().out
    assert "36 images judged, 1 without a class;" in text
    assert "left out: 3 of 40 images could not be used (" in text
    assert "train-0.parquet#0 / 0.jpg: not an image" in text
    broken = shards("broken", LABELS[:4], broken=4)
    assert "no image of broken/train could be decoded" in error(evaluate.main, classifier, "--data", broken)
