"""kNN as a command: the library's numbers. test_linear_probe.py has the mistakes that all probes share."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mixmae.convert import digest_of, load_encoder
from mixmae.probing.knn import KnnConfig, knn_classify
from pipelines import knn
from tests.unit.pipelines.conftest import library_features

LABELS = [row % 4 for row in range(60)]


@pytest.mark.usefixtures("no_cluster")
def test_numbers_out_of_range(error, weights, shards):
    data = shards("set", LABELS)
    for flags, sentence in (
        (("--k", 0), "k is 0"),
        (("--weights-key", "model_ema"), "has no weights under model_ema"),
        (("--k", 99), "--k is 99, but there are only 54 training images"),
        (("--train-images", 0), "--train-images is 0"),
        (("--train-images", 2, "--k", 1), "validation images have none among the 2 training images that vote"),
        (("--output", weights), "cannot write to"),
        (("--batch-size", 0), "--batch-size is 0"),
        (("--crop-pct", 2), "--crop-pct is 2"),
        (("--resize-share", 2), "--crop-pct is 2"),  # its name in earlier versions
    ):
        assert sentence in error(knn.main, weights, "--data", data, *flags)


def test_knn_is_the_librarys_on_the_same_features(here, store, weights, shards, capsys):
    from mlflow import MlflowClient

    data = shards("set", LABELS, LABELS[:21])
    arguments = (weights, "--data", data, "--k", 5, "--output", here / "judged", "--run-name", "mine")
    assert knn.main([str(item) for item in arguments]) == 0
    train, validation = (library_features(weights, data, split) for split in ("train", "validation"))
    expected = knn_classify(*train, *validation, num_classes=4, config=KnnConfig(k=5)).accuracy
    found = json.loads((here / "judged" / "knn.json").read_text())
    assert 0.3 < expected.top[1] < 1
    assert (found["top1"], found["top5"], found["num_judged"]) == (expected.top[1], expected.top[5], 21)
    assert found["weights_digest"] == digest_of(load_encoder(weights)[0].state_dict())
    assert f"top-1 {expected.top[1]:.2%}" in capsys.readouterr().out
    seen = MlflowClient(tracking_uri=store).get_run(found["run_id"])
    assert seen.data.metrics["val/top1"] == pytest.approx(expected.top[1])
    assert (seen.data.params["k"], seen.data.tags["stage"], seen.info.status) == ("5", "knn", "FINISHED")


def test_part_of_the_training_images_is_spread_over_them():
    source = SimpleNamespace(num_rows=100)
    assert knn.choose_rows(source, 4).tolist() == [0, 25, 50, 75]
    assert knn.choose_rows(source, 500).tolist() == list(range(100))
    assert len(knn.choose_rows(source, None)) == 100


def test_broken_images_are_named_and_in_no_figure(here, weights, shards, capsys):
    data = shards("set", LABELS, LABELS[:21], broken=5)
    assert knn.main([str(weights), "--data", str(data), "--k", "5", "--output", str(here / "judged")]) == 0
    found = json.loads((here / "judged" / "knn.json").read_text())
    assert (found["train_images"], found["validation_images"], found["num_broken"]) == (55, 16, 10)
    text = capsys.readouterr().out
    assert "55 training and 16 validation images" in text
    for part in ("5 of 60", "5 of 21"):
        assert f"left out: {part} images could not be used (" in text
    assert "0.jpg: not an image" in text
