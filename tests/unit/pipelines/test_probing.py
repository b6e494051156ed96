"""kNN, linear probe and embeddings as pipelines, and the probe of pretraining: numbers, and what users get wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from mixmae.convert import Preprocessing, digest_of, load_encoder, save_encoder
from mixmae.data.blocks import eval_batches
from mixmae.data.sources.open import open_source
from mixmae.jobs.config import differences, to_json
from mixmae.probing.features import extract_features
from mixmae.probing.knn import KnnConfig, knn_classify
from mixmae.probing.ridge import OnlineProbeConfig, probe_features
from mixmae.training.worker import EvaluationSkipped
from pipelines import embed, evaluate, knn, linear_probe, predict, pretrain, runs
from pipelines.features import load_frozen
from pipelines.pretrain import PretrainJob, choose_probe
from pipelines.recipes import LINEAR_PROBE_RECIPES, PRETRAIN_RECIPES
from tests.factories import tiny_swin

MEAN = (0.4, 0.5, 0.6)
LABELS = [row % 4 for row in range(60)]


def _jpeg(seed: int, label: int) -> bytes:
    """Noise on a ground whose colour tells the class, so that neighbours are not a matter of luck."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (70, 80, 3)) + 40 * label * np.array([1, 0, -1]) + 60
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Writes a set of given labels, or without a label column for None, and returns its folder."""

    def write(name: str, labels: list[int] | None, validation: list[int] | None = None, broken: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, values in (("train", labels), ("validation", validation)):
            if split == "train" or values is not None:
                count = len(values or LABELS)
                images = [
                    {
                        "bytes": b"no image" if row < broken else _jpeg(row, (values or LABELS)[row]),
                        "path": f"{row}.jpg",
                    }
                    for row in range(count)
                ]
                columns = {"image": images, **({} if values is None else {"label": values})}
                pq.write_table(pa.table(columns), folder / f"{split}-0.parquet", row_group_size=16)
        return folder

    return write


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


def _error(capsys, main, *argv: object, code: int = 1) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    assert stop.value.code == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.replace("│", " ").split())


class TestMistakes:
    @pytest.fixture(autouse=True)
    def _no_store(self, monkeypatch, here):
        def refuse(*_: object, **__: object) -> None:
            pytest.fail("reached MLflow or the cluster")

        for module in (runs, knn):
            monkeypatch.setattr(module, "create_run", refuse)
        monkeypatch.setattr(runs, "connect", refuse)

    @pytest.fixture(params=["knn", "linear_probe", "linear_probe --cached"])
    def error(self, request, capsys):
        """The command on these weights and data, whose message it returns."""

        def run(path: Path, data: Path, *more: object) -> str:
            if request.param == "knn":
                return _error(capsys, knn.main, path, "--data", data, *more)
            flags = ["--cached"] * ("--cached" in request.param)
            common = ("demo_linear", "--pretrained", path, "--data", data, "--augment.image-size", 64)
            return _error(capsys, linear_probe.main, *common, *flags, *more)

        return run

    def test_images_without_labels(self, error, weights, shards):
        assert "has no labels" in error(weights, shards("set", None))

    def test_labels_with_gaps(self, error, weights, shards):
        text = error(weights, shards("set", [label * 30 for label in LABELS]))
        assert "go up to 90, but only 4 of these numbers are used" in text

    def test_a_validation_split_without_rows(self, error, weights, shards):
        folder = shards("set", LABELS)
        table = pq.read_table(folder / "train-0.parquet")
        pq.write_table(table.slice(0, 0), folder / "validation-0.parquet")
        assert "set/validation" in error(weights, folder)

    def test_a_validation_split_without_labels(self, error, weights, shards):
        text = error(weights, shards("set", LABELS, [-1, -1]))
        assert "validation set set/validation has no image with a class" in text

    def test_weights_that_are_none(self, error, weights, shards, tmp_path):
        data = shards("set", LABELS)
        assert "does not exist" in error(tmp_path / "no.pth", data)
        torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
        assert "no known format" in error(tmp_path / "other.pth", data)

    def test_a_damaged_file(self, error, weights, shards):
        content = bytearray(weights.read_bytes())
        content[-3] ^= 0xFF
        weights.write_bytes(content)
        assert "is damaged or was changed" in error(weights, shards("set", LABELS))

    def test_a_run_without_a_checkpoint(self, error, shards, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        assert "without a checkpoint" in error(tmp_path / "run", shards("set", LABELS))

    def test_weights_of_another_encoder_than_the_flags_say(self, capsys, weights, shards):
        arguments = ("demo_linear", "--pretrained", weights, "--data", shards("set", LABELS), "--cached")
        text = _error(capsys, linear_probe.main, *arguments, "--encoder.embed-dim", 64)
        assert "holds weights of a Swin of width 16 with 1-1-2-1 blocks; the model has a Swin of width 64" in text

    def test_a_folder_of_the_other_way(self, capsys, tmp_path):
        begun = {"status": "running", "config": to_json(LINEAR_PROBE_RECIPES["demo_linear"]()), "cached": True}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        text = _error(capsys, linear_probe.main, "demo_linear", "--output", tmp_path / "run")
        assert "holds a probe with --cached" in text

    def test_numbers(self, capsys, weights, shards):
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
            assert sentence in _error(capsys, knn.main, weights, "--data", data, *flags)

    def test_what_a_cached_probe_cannot_do(self, capsys):
        for flags in (("--loop.steps", 3), ("--ema-decay", 0.9), ("--workers", 2)):
            text = _error(capsys, linear_probe.main, "demo_linear", "--cached", *flags)
            assert "--cached trains whole epochs in this process" in text

    def test_embedding(self, capsys, weights, shards, tmp_path):
        data = shards("set", LABELS, [0, 1])
        out = tmp_path / "out.parquet"
        assert "several splits" in _error(capsys, embed.main, weights, "--data", data, "--output", out)
        out.write_text("mine")
        arguments = (weights, "--data", data, "--output", out, "--split", "train")
        assert "is there already" in _error(capsys, embed.main, *arguments)
        assert "--workers is 0" in _error(capsys, embed.main, *arguments, "--workers", 0)
        assert out.read_text() == "mine"
        below = (weights, "--data", data, "--output", out / "features")
        assert "cannot write to" in _error(capsys, embed.main, *below)


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
            (tmp_path / "photos" / name).write_bytes(_jpeg(1, 0))
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
    assert config.micro_batch(8) == 512


class TestOnlineProbe:
    def _job(self, probe) -> PretrainJob:
        config = PRETRAIN_RECIPES["demo"]()
        encoder = replace(config.encoder, image_size=64, window_sizes=(8, 8, 4, 2), embed_dim=8)
        config = replace(config, augment=replace(config.augment, image_size=64), encoder=encoder)
        return PretrainJob(config=config, source=None, heldout=None, run=None, probe=probe)  # type: ignore[arg-type]

    def test_it_is_the_librarys_and_leaves_the_model_and_the_generators_as_they_were(self, shards):
        source = open_source(shards("set", LABELS))
        probe = choose_probe(OnlineProbeConfig(images=60, k=5), source, source)
        assert probe is not None
        job = self._job(probe)
        torch.manual_seed(0)
        model = job.build_model().train()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        drawn_from = torch.get_rng_state()
        metrics = job.evaluate(model, rank=0, num_workers=1)
        assert torch.equal(drawn_from, torch.get_rng_state())
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        batches = eval_batches(source, 64, batch_size=64, rows=probe.rows)
        config = job.config
        features, labels = extract_features(model.encoder, batches, mean=config.pixel_mean, std=config.pixel_std)
        assert metrics.pop("perf/probe_s") > 0
        assert metrics == pytest.approx(probe_features(features, labels, 5))
        assert metrics["probe/linear_top1"] > 0.4  # colour

    def test_shares_of_three_workers_are_those_of_one(self, shards, monkeypatch):
        source = open_source(shards("set", LABELS))
        job = self._job(choose_probe(OnlineProbeConfig(images=50, k=5), source, source))
        torch.manual_seed(0)
        model = job.build_model()
        whole = job.evaluate(model, rank=0, num_workers=1)
        shares: dict[int, object] = {}

        def gather(into: list, share: object) -> None:
            shares[len(shares)] = share
            into[:] = [shares.get(rank, share) for rank in range(3)]

        monkeypatch.setattr(pretrain.dist, "all_gather_object", gather)
        for rank in range(3):
            metrics = job.evaluate(model, rank=rank, num_workers=3)
        assert {**metrics, "perf/probe_s": 0} == {**whole, "perf/probe_s": 0}

    def test_a_failure_is_said_by_all_and_ends_nothing(self, shards, monkeypatch):
        source = open_source(shards("set", LABELS))
        job = self._job(choose_probe(OnlineProbeConfig(images=50, k=5), source, source))
        model = job.build_model()
        nn.init.constant_(model.encoder.norm.weight, float("nan"))
        with pytest.raises(EvaluationSkipped, match=r"no probe .*not finite"):
            job.evaluate(model, rank=0, num_workers=1)
        # One worker cannot read its images; the other must hear of it and not wait.
        monkeypatch.setattr(pretrain, "_probe_batches", lambda *_: (_ for _ in ()).throw(OSError("no route")))
        monkeypatch.setattr(
            pretrain.dist, "all_gather_object", lambda into, share: into.__setitem__(slice(None), [share] * 2)
        )
        with pytest.raises(EvaluationSkipped, match="OSError: no route"):
            job.evaluate(model, rank=0, num_workers=2)

    def test_which_images(self, shards, capsys):
        config = OnlineProbeConfig(images=40, k=5)
        train, few = open_source(shards("set", LABELS)), open_source(shards("few", LABELS[:8]))
        assert choose_probe(config, few, train).source is train  # type: ignore[union-attr]
        assert "few" not in capsys.readouterr().out
        assert choose_probe(config, train, few).source is train  # type: ignore[union-attr]
        assert "30 images of 2 classes of set/train (a guess: 50.0%)" in capsys.readouterr().out
        none = open_source(shards("none", None))
        assert choose_probe(config, none, none) is None
        assert "no probe" in capsys.readouterr().out
        assert choose_probe(OnlineProbeConfig(images=40, k=20), few, few) is None
        assert "only 4 images" in capsys.readouterr().out
        assert choose_probe(OnlineProbeConfig(images=0), train, train) is None
        assert capsys.readouterr().out == ""

    def test_a_run_begun_before_there_was_a_probe_goes_on(self):
        now = to_json(PRETRAIN_RECIPES["demo"]())
        before = {name: value for name, value in now.items() if name != "probe"}
        assert differences(before, now) == []
        assert differences({**now, "probe": {"images": 0, "k": 1}}, now) == []
