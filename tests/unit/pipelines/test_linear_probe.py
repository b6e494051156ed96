"""What a user can get wrong when probing, kNN included; a cached probe; the paper's recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mixmae.convert import digest_of, load_encoder
from mixmae.jobs.config import to_json
from pipelines import evaluate, knn, linear_probe, predict
from pipelines.recipes import LINEAR_PROBE_RECIPES, PRETRAIN_RECIPES

LABELS = [row % 4 for row in range(60)]


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

    def test_images_of_which_hardly_any_decodes(self, refused, weights, shards):
        text = refused(weights, shards("set", LABELS, LABELS[:8], broken=60))
        assert "train-0.parquet#0 / 0.jpg: not an image" in text

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

    def test_what_a_cached_probe_cannot_do(self, error):
        for flags in (("--loop.steps", 3), ("--ema-decay", 0.9), ("--workers", 2)):
            text = error(linear_probe.main, "demo_linear", "--cached", *flags)
            assert "--cached trains whole epochs in this process" in text


def test_a_cached_probe_is_a_classifier_for_evaluate_and_predict(here, weights, shards):
    data = shards("set", LABELS, LABELS[:21])
    arguments = ["demo_linear", "--pretrained", str(weights), "--data", str(data), "--output", str(here / "probe")]
    flags = ["--augment.image-size", "64", "--cached", "--loop.epochs", "40"]
    assert linear_probe.main([*arguments, *flags]) == 0
    content = json.loads((here / "probe" / "run.json").read_text())
    top1 = content["metrics"]["final/top1"]
    assert top1 > 0.6  # the colour of the ground; chance level 0.25
    assert evaluate.main([str(here / "probe"), "--data", str(data), "--output", str(here / "judged")]) == 0
    judged = json.loads((here / "judged" / "metrics.json").read_text())
    assert (judged["top1"], judged["loss"]) == pytest.approx((top1, content["metrics"]["final/loss"]), rel=1e-5)
    assert predict.main([str(here / "probe"), str(data), "--output", str(here / "predicted")]) == 0
    assert len((here / "predicted" / "predictions.csv").read_text().splitlines()) == 82
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
    assert config.share(num_workers=8).micro_batches == 4 * (512,)
