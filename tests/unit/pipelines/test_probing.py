"""kNN, linear probe and embeddings as pipelines: numbers, and what users get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mixmae.convert import Preprocessing, digest_of, load_encoder, save_encoder
from mixmae.data.blocks import eval_batches
from mixmae.data.sources import open_source
from mixmae.jobs.config import to_json
from mixmae.probing.features import extract_features
from mixmae.probing.knn import KnnConfig, knn_classify
from pipelines import embed, evaluate, knn, linear_probe, predict
from pipelines.features import load_frozen
from pipelines.recipes import LINEAR_PROBE_RECIPES, PRETRAIN_RECIPES
from tests.factories import tiny_swin
from tests.unit.conftest import coloured_jpeg

MEAN = (0.4, 0.5, 0.6)
LABELS = [row % 4 for row in range(60)]


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights" / "encoder.safetensors"
    torch.manual_seed(0)
    save_encoder(path, tiny_swin(64), Preprocessing(image_size=(64, 64), mean=MEAN))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def here(monkeypatch, tmp_path, store) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tmp_path


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    @pytest.fixture(params=["knn", "linear_probe", "linear_probe --cached"])
    def refused(self, request, error):
        """The command on these weights and data, whose message it returns."""

        def run(path: Path, data: Path, *more: object) -> str:
            if request.param == "knn":
                return error(knn.main, path, "--data", data, *more)
            flags = ["--cached"] * ("--cached" in request.param)
            common = ("demo_linear", "--pretrained", path, "--data", data, "--augment.image-size", 64)
            return error(linear_probe.main, *common, *flags, *more)

        return run

    def test_images_without_labels(self, refused, weights, shards):
        assert "has no labels" in refused(weights, shards("set", None))

    def test_labels_with_gaps(self, refused, weights, shards):
        text = refused(weights, shards("set", [label * 30 for label in LABELS]))
        assert "go up to 90, but only 4 of these numbers are used" in text

    def test_a_validation_split_without_rows(self, refused, weights, shards):
        folder = shards("set", LABELS)
        table = pq.read_table(folder / "train-0.parquet")
        pq.write_table(table.slice(0, 0), folder / "validation-0.parquet")
        assert "set/validation" in refused(weights, folder)

    def test_a_validation_split_without_labels(self, refused, weights, shards):
        text = refused(weights, shards("set", LABELS, [-1, -1]))
        assert "validation set set/validation has no image with a class" in text

    def test_weights_that_are_none(self, refused, weights, shards, tmp_path):
        data = shards("set", LABELS)
        assert "does not exist" in refused(tmp_path / "no.pth", data)
        torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
        assert "no known format" in refused(tmp_path / "other.pth", data)

    def test_a_damaged_file(self, refused, weights, shards):
        content = bytearray(weights.read_bytes())
        content[-3] ^= 0xFF
        weights.write_bytes(content)
        assert "is damaged or was changed" in refused(weights, shards("set", LABELS))

    def test_a_run_without_a_checkpoint(self, refused, shards, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        assert "without a checkpoint" in refused(tmp_path / "run", shards("set", LABELS))

    def test_weights_of_another_encoder_than_the_flags_say(self, error, weights, shards):
        arguments = ("demo_linear", "--pretrained", weights, "--data", shards("set", LABELS), "--cached")
        text = error(linear_probe.main, *arguments, "--encoder.embed-dim", 64)
        assert "holds weights of a Swin of width 16 with 1-1-2-1 blocks; the model has a Swin of width 64" in text

    def test_a_folder_of_the_other_way(self, error, tmp_path):
        begun = {"status": "running", "config": to_json(LINEAR_PROBE_RECIPES["demo_linear"]()), "cached": True}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        text = error(linear_probe.main, "demo_linear", "--output", tmp_path / "run")
        assert "holds a probe with --cached" in text

    def test_numbers(self, error, weights, shards):
        data = shards("set", LABELS)
        for flags, sentence in (
            (("--k", 0), "k is 0"),
            (("--k", 99), "--k is 99, but there are only 54 training images"),
            (("--train-images", 0), "--train-images is 0"),
            (("--train-images", 2, "--k", 1), "validation images have none among the 2 training images that vote"),
            (("--output", weights), "cannot write to"),
            (("--batch-size", 0), "--batch-size is 0"),
            (("--resize-share", 2), "--resize-share is 2"),
        ):
            assert sentence in error(knn.main, weights, "--data", data, *flags)

    def test_what_a_cached_probe_cannot_do(self, error):
        for flags in (("--loop.steps", 3), ("--ema-decay", 0.9), ("--workers", 2)):
            text = error(linear_probe.main, "demo_linear", "--cached", *flags)
            assert "--cached trains whole epochs in this process" in text

    def test_embedding(self, error, weights, shards, tmp_path):
        data = shards("set", LABELS, [0, 1])
        out = tmp_path / "out.parquet"
        assert "several splits" in error(embed.main, weights, "--data", data, "--output", out)
        out.write_text("mine")
        arguments = (weights, "--data", data, "--output", out, "--split", "train")
        assert "is there already" in error(embed.main, *arguments)
        assert "--workers is 0" in error(embed.main, *arguments, "--workers", 0)
        assert out.read_text() == "mine"
        below = (weights, "--data", data, "--output", out / "features")
        assert "cannot write to" in error(embed.main, *below)


def _features(weights: Path, data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By the library alone."""
    encoder, metadata = load_encoder(weights)
    preprocessing = metadata.preprocessing
    batches = eval_batches(open_source(data, split), preprocessing.image_size, batch_size=7)
    return extract_features(encoder, batches, mean=preprocessing.mean, std=preprocessing.std)


def test_knn_is_the_librarys_on_the_same_features(here, store, weights, shards, capsys):
    from mlflow import MlflowClient

    data = shards("set", LABELS, LABELS[:21])
    arguments = (weights, "--data", data, "--k", 5, "--output", here / "judged", "--run-name", "mine")
    assert knn.main([str(item) for item in arguments]) == 0
    train, validation = (_features(weights, data, split) for split in ("train", "validation"))
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


class TestEmbed:
    def test_values_are_those_of_the_library_and_files_say_what_they_are(self, tmp_path, weights, shards, monkeypatch):
        monkeypatch.setattr(embed, "PART_ROWS", 25)  # three row groups
        data = shards("set", [*LABELS[:59], -1], broken=2)
        arguments = [str(weights), "--data", str(data), "--output", str(tmp_path / "out"), "--batch-size", "7"]
        assert embed.main(arguments) == 0
        file = tmp_path / "out" / "train.parquet"
        table = pq.read_table(file)
        read = table["feature"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        features, labels = _features(weights, data, "train")
        np.testing.assert_allclose(read, features.numpy()[2:], rtol=1e-4, atol=1e-5)
        assert table["row"].to_pylist() == list(range(2, 60))
        assert table["path"].to_pylist()[:2] == ["2.jpg", "3.jpg"]
        assert table["label"].to_pylist() == [*labels.tolist()[2:59], None]
        assert pq.ParquetFile(file).num_row_groups == 3
        facts = json.loads(table.schema.metadata[b"mixmae"])
        assert facts["width"] == 128
        assert pq.read_metadata(file).metadata[b"mixmae.broken"] == b"2"
        assert facts["encoder_digest"] == digest_of(load_encoder(weights)[0].state_dict())
        assert facts["preprocessing"]["mean"] == list(MEAN)
        assert [item.name for item in file.parent.iterdir()] == ["train.parquet"]

    def test_a_folder_of_files_keeps_their_names(self, tmp_path, weights):
        for name in ("a.jpg", "deep/b.jpg"):
            (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "photos" / name).write_bytes(coloured_jpeg(1, 0))
        out = tmp_path / "out.parquet"
        assert embed.main([str(weights), "--data", str(tmp_path / "photos"), "--output", str(out)]) == 0
        table = pq.read_table(out)
        assert table["path"].to_pylist() == ["a.jpg", "deep/b.jpg"]
        assert table["label"].null_count == 2

    def test_nothing_is_left_of_one_that_fails(self, tmp_path, weights, shards, monkeypatch):
        monkeypatch.setattr(embed, "PART_ROWS", 25)
        frozen, source = load_frozen(weights), open_source(shards("set", LABELS))
        embedder, calls = embed.Embedder(frozen, source), []

        def fails(rows):
            calls.append(rows)
            if len(calls) == 2:
                raise OSError("the disk is full")
            return embedder(rows)

        monkeypatch.setattr(embed, "Embedder", lambda *_: fails)
        arguments = [str(weights), "--data", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
        with pytest.raises(OSError, match="full"):
            embed.main(arguments)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_cached_probe_is_a_classifier_for_evaluate_and_predict(here, weights, shards):
    data = shards("set", LABELS, LABELS[:21])
    arguments = ["demo_linear", "--pretrained", str(weights), "--data", str(data), "--output", str(here / "probe")]
    flags = ["--augment.image-size", "64", "--cached", "--loop.epochs", "40"]
    assert linear_probe.main([*arguments, *flags]) == 0
    content = json.loads((here / "probe" / "run.json").read_text())
    top1 = content["metrics"]["final/top1"]
    assert top1 > 0.6  # the colour of the ground; a guess has 0.25
    assert evaluate.main([str(here / "probe"), "--data", str(data), "--output", str(here / "judged")]) == 0
    judged = json.loads((here / "judged" / "metrics.json").read_text())
    assert (judged["top1"], judged["loss"]) == pytest.approx((top1, content["metrics"]["final/loss"]), rel=1e-5)
    assert predict.main([str(here / "probe"), str(data), "--output", str(here / "said")]) == 0
    assert len((here / "said" / "predictions.csv").read_text().splitlines()) == 82
    # The encoder has not moved, and the same command does nothing.
    kept, _ = load_encoder(here / "probe" / "best")
    assert digest_of(kept.state_dict()) == digest_of(load_encoder(weights)[0].state_dict())
    before = (here / "probe" / "run.json").stat().st_mtime_ns
    assert linear_probe.main([*arguments, *flags]) == 0
    assert (here / "probe" / "run.json").stat().st_mtime_ns == before


def test_the_papers_probe_is_maes():
    config = LINEAR_PROBE_RECIPES["mixmae_swin_base_linear_90ep"]()
    assert (config.optim.optimizer, config.optim.weight_decay, config.optim.betas[0]) == ("lars", 0.0, 0.9)
    assert config.optim.peak_lr(config.loop.batch_size) == pytest.approx(6.4)
    assert (config.loop.batch_size, config.loop.epochs, config.loop.warmup_epochs) == (16384, 90, 10)
    assert (config.augment.num_operations, config.augment.erasing, config.augment.flip) == (0, 0, 0.5)
    assert (config.mixup.mixup, config.mixup.cutmix, config.mixup.label_smoothing) == (0, 0, 0)
    assert config.encoder == PRETRAIN_RECIPES["mixmae_swin_base_600ep"]().encoder
    assert config.share(num_workers=8).micro_batch == 512
