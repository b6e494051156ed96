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
