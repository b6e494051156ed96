"""Finetuning end to end on the built-in moths: a real Ray cluster, a real MLflow server, as a user runs it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mixmae.convert import load_encoder, read_weights
from mixmae.decoders import DecoderConfig
from mixmae.encoders.base import head_depth
from mixmae.encoders.build import build_encoder, config_to_json
from mixmae.jobs.config import to_json
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.tracking import create_run, finish_run
from mixmae.training.checkpoint import save_checkpoint
from pipelines.recipes import PRETRAIN_RECIPES
from tests.ray.conftest import ENCODER, Finished, command, has_checkpoint, interrupt, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHORT = [
    *("--augment.image-size", "64", "--encoder.drop-path", "0.2", "--mixup.mixup", "0.8", "--mixup.cutmix", "1.0"),
    *("--ema-decay", "0.9", "--optim.base-lr", "0.03", "--loop.batch-size", "16", "--loop.micro-batch-size", "8"),
    *("--loop.steps", "40", "--loop.log-every-steps", "5"),
]
"""Drop path, mixing and an average of the weights: all that a resumed run must do alike. Micro-batches of one size make
one worker's run the same as two workers'."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, mlflow_server) -> Path:
    """The folder of a pretraining run, with a checkpoint as pretraining writes it and a run in the same store."""
    folder = tmp_path_factory.mktemp("pretraining") / "photos"
    torch.manual_seed(3)
    method = MixMAE(
        build_encoder(ENCODER), MixMAEConfig(num_images=2, decoder=DecoderConfig(dim=32, depth=1, num_heads=4))
    )
    reference = create_run(uri=mlflow_server, experiment="pretraining", name="photos", params={}, tags={})
    finish_run(reference, status="FINISHED")
    config = to_json(PRETRAIN_RECIPES["demo"]())
    config["encoder"] = config_to_json(ENCODER)
    config["augment"]["image_size"] = 64
    config["pixel_mean"] = [0.5, 0.5, 0.5]
    state = {"config": config, "position": {"step": 40}, "mlflow": vars(reference), "data": {}, "versions": {}}
    save_checkpoint(folder / "checkpoints" / "step_0000040", model=method, optimizer=None, state=state)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained, mlflow_server) -> Finished:
    """One run to its end; the other runs are compared with it."""
    base = tmp_path_factory.mktemp("runs")
    arguments = ["--pretrained", str(pretrained), "--mlflow-uri", mlflow_server, "--workers", "1", *SHORT]
    done = run("demo_finetune", "--output", base / "whole", *arguments, cwd=base, pipeline="finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(base / "whole", mlflow_server, arguments, done.stdout)


def test_the_run_says_what_it_did(finished):
    assert "the recipe's is another one" in finished.text  # the checkpoint's encoder is smaller
    assert "20 classes, validation on 1000 images" in finished.text
    assert "evaluation after step 40: val/loss" in finished.text
    assert "Finished in" in finished.text


def test_it_starts_from_the_pretrained_encoder_and_its_preprocessing(finished, pretrained):
    initial, metadata = load_encoder(finished.output / "initial.safetensors")
    theirs, _ = load_encoder(pretrained / "checkpoints" / "step_0000040")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, initial.state_dict()[name]), name
    assert metadata.preprocessing.mean == (0.5, 0.5, 0.5)
    state = json.loads((finished.checkpoint / "state.json").read_text())
    assert state["config"]["pixel_mean"] == [0.5, 0.5, 0.5]
    assert state["config"]["encoder"]["drop_path"] == 0.2  # the command line's, not the checkpoint's
    # After 40 steps the stem, at 0.8 ** 5 of the rate, has moved less than the last block.
    moved = {
        name: (value - theirs.state_dict()[name]).abs().mean()
        for name, value in ((key.removeprefix("encoder."), value) for key, value in finished.weights.items())
        if name.endswith("weight") and name in theirs.state_dict()
    }
    assert 0 < moved["patch_embed.proj.weight"] < 0.7 * moved["stages.3.blocks.0.mlp.fc1.weight"]


def test_every_parameter_has_the_rate_of_its_depth(finished):
    """What the optimiser really held at the last step, read from its state, against the depths by hand."""
    saved = torch.load(finished.checkpoint / "optimizer.pt", weights_only=True)
    rates = {name: group["lr"] for group in saved["param_groups"] for name in group["names"]}
    lr = finished.state["metrics"]["lr"]
    depths = {"patch_embed": 0, "norm": 4, "head": 4}  # official: the head has the depth of the last block
    for name, rate in rates.items():
        part = name.removeprefix("encoder.").split(".")
        depth = int(part[1]) + 1 if part[0] == "stages" else depths[part[0]]
        assert rate == pytest.approx(lr * 0.8 ** (5 - depth), rel=1e-9), name
    assert rates.keys() == finished.weights.keys() - {"encoder.pos_embed"}
    assert head_depth(build_encoder(ENCODER), "official") == depths["head"]


def test_mlflow_holds_the_run_and_the_way_back(finished, pretrained):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished.server)
    seen = client.get_run(finished.state["mlflow"]["run_id"])
    assert seen.info.status == "FINISHED"
    numbers = {
        name: float(seen.data.params[name])
        for name in ("layer_decay", "drop_path", "lr", "weight_decay", "epochs", "batch_size", "image_size", "seed")
    }
    assert numbers["layer_decay"] == 0.8
    assert numbers["drop_path"] == 0.2
    assert numbers["lr"] == pytest.approx(0.03 * 16 / 256)
    assert float(seen.data.params["params_m"]) > 0
    assert float(seen.data.params["gmacs"]) > 0
    metrics = seen.data.metrics
    assert [point.step for point in client.get_metric_history(seen.info.run_id, "val/top1")] == [10, 20, 30, 40]
    assert metrics["final/top1"] == metrics["val/top1"]
    assert metrics["final/loss"] == pytest.approx(metrics["val/loss"])
    tops = [client.get_metric_history(seen.info.run_id, name) for name in ("val/top1", "val_ema/top1")]
    assert metrics["best/top1"] == max(point.value for history in tops for point in history)
    assert metrics["val/top1"] <= metrics["val/top5"]

    state = json.loads((pretrained / "checkpoints" / "step_0000040" / "state.json").read_text())
    origin = state["mlflow"]["run_id"]
    assert seen.data.tags["pretrained.run_id"] == origin
    assert client.get_run(origin).data.tags[f"finetuned.{seen.info.run_id}"] == "whole"


def test_a_uniform_prediction_costs_the_logarithm_of_the_classes(finished):
    """The head starts near zero, so the first loss is that of chance among 20 classes, whatever the encoder's."""
    step, loss = finished.curve("train/loss")[0]
    assert step == 1
    assert loss == pytest.approx(math.log(20), abs=2e-3)


@pytest.mark.slow
def test_interrupted_and_continued_equals_uninterrupted(finished):
    """Ctrl-C in the middle, then the same command: the same weights and average, bit for bit, and the same best."""
    output = finished.output.parent / "interrupted"
    arguments = ("demo_finetune", "--output", output, *finished.arguments)
    program = command(*arguments, pipeline="finetune")
    status, text = interrupt(program, lambda: has_checkpoint(output), cwd=output.parent)
    assert status == 130, text

    second = run(*arguments, cwd=output.parent, pipeline="finetune")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Continuing" in second.stdout
    continued = Finished(output, finished.server, finished.arguments, second.stdout)
    assert [step for step, _ in continued.curve("train/loss")].count(1) == 1  # it did not begin anew
    for name, value in finished.weights.items():
        assert torch.equal(value, continued.weights[name]), name
    averages = [torch.load(one.checkpoint / "average.pt", weights_only=True) for one in (finished, continued)]
    assert averages[0]["updates"] == averages[1]["updates"] == 40
    for name, value in averages[0]["averages"].items():
        assert torch.equal(value, averages[1]["averages"][name]), name
    best = [json.loads((one.output / "best" / "state.json").read_text()) for one in (finished, continued)]
    assert best[0]["metrics"] == best[1]["metrics"]
    assert best[0]["position"] == best[1]["position"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [pytest.param((), id="ddp"), pytest.param(("--loop.shard",), id="sharded")])
def test_two_workers_compute_what_one_does(finished, flags):
    output = finished.output.parent / f"two{len(flags)}"
    arguments = ("demo_finetune", "--output", output, *finished.arguments, "--workers", "2", *flags)
    done = run(*arguments, cwd=output.parent, pipeline="finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    two = Finished(output, finished.server, finished.arguments, done.stdout)
    assert two.state["metrics"]["loss"] == pytest.approx(finished.state["metrics"]["loss"], rel=1e-3)
    assert two.state["metrics"]["val/loss"] == pytest.approx(finished.state["metrics"]["val/loss"], rel=1e-3)
    assert two.state["metrics"]["val/top5"] == pytest.approx(finished.state["metrics"]["val/top5"], abs=0.01)


def test_evaluation_agrees_with_the_run(finished):
    base = finished.output.parent
    for model, prefix in ((finished.output, "best"), (finished.checkpoint, "final")):
        done = run(model, "--output", base / prefix, cwd=base, pipeline="evaluate")
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = json.loads((base / prefix / "metrics.json").read_text())
        assert numbers["num_judged"] == 1000
        for name in ("top1", "top5", "loss"):
            assert numbers[name] == pytest.approx(finished.state["metrics"][f"{prefix}/{name}"], rel=1e-6), name
    table = list(csv.DictReader((base / "best" / "classes.csv").open()))
    assert [row["name"] for row in table][:3] == ["brook", "cinder", "clover"]
    top1 = sum(float(row["top1"]) * int(row["images"]) for row in table) / 1000
    assert top1 == pytest.approx(finished.state["metrics"]["best/top1"], abs=1e-4)
    for name in ("confusions.png", "calibration.png"):
        assert (base / "best" / name).stat().st_size > 5000


def test_the_checkpoint_is_exported_as_a_classifier_that_predicts_alike(finished, photos):
    base = finished.output.parent
    done = run(finished.output / "best", "--output", base / "exported", cwd=base, pipeline="export")
    assert done.returncode == 0, done.stdout + done.stderr
    file = base / "exported" / "classifier.safetensors"
    assert read_weights(file).metadata.num_classes == 20
    rows = {}
    for name, model in (("run", finished.output), ("file", file)):
        done = run(model, photos, "--output", base / name, cwd=base, pipeline="predict")
        assert done.returncode == 0, done.stdout + done.stderr
        rows[name] = list(csv.DictReader((base / name / "predictions.csv").open()))
    assert rows["run"] == rows["file"]
    assert len(rows["run"]) == 80
    (broken,) = (row for row in rows["run"] if row["problem"])
    assert (broken["file"], broken["class"], broken["top5"]) == (str(photos / "a" / "001.jpg"), "", "")
    whole = [row for row in rows["run"] if row is not broken]
    assert {row["class"] for row in whole} <= {row["name"] for row in csv.DictReader(_classes(finished))}
    assert all(len(row["top5"].split("; ")) == 5 for row in whole)
    assert (base / "run" / "predictions.png").stat().st_size > 5000


def _classes(finished: Finished) -> list[str]:
    state = json.loads((finished.checkpoint / "state.json").read_text())
    return ["name", *state["classes"]]


def test_another_set_or_other_weights_in_the_same_output_are_refused(finished, photos, pretrained, tmp_path):
    base = finished.output.parent
    arguments = ("demo_finetune", "--output", finished.output, *finished.arguments)
    other = run(*arguments, "--data", photos, cwd=base, pipeline="finetune")
    assert other.returncode == 0  # it is finished, and data that are not needed are not looked at
    assert "finished" in other.stdout
    moved = tmp_path / "other.safetensors"
    tensors = read_weights(pretrained / "checkpoints" / "step_0000040").state
    safetensors.torch.save_file({name: value + 1 for name, value in tensors.items()}, moved)
    other = run(*arguments, "--pretrained", moved, cwd=base, pipeline="finetune")
    assert other.returncode == 1
    assert "pretrained was" in other.stderr
