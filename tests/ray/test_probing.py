"""A linear probe through Ray Train, and embeddings through Ray Data, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from mixmae.convert import Preprocessing, save_encoder
from mixmae.encoders.build import build_encoder
from mixmae.tracking import create_run, finish_run
from tests.ray.conftest import ENCODER, Finished, command, has_checkpoint, interrupt, run
from tests.unit.conftest import coloured_jpeg

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHORT = [
    *("--augment.image-size", "64", "--loop.batch-size", "64", "--loop.micro-batch-size", "32"),
    *("--loop.steps", "60", "--loop.log-every-steps", "5", "--optim.base-lr", "0.04"),
    *("--loop.evaluate-every-epochs", "4", "--loop.checkpoint-every-epochs", "4", "--workers", "1"),
]
"""60 steps are 16 epochs of 240 images."""


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Shards of four classes that random weights can separate, by the colour of the ground."""
    folder = tmp_path_factory.mktemp("colours")
    for split, first, count in (("train", 0, 240), ("validation", 240, 60)):
        labels = [row % 4 for row in range(count)]
        images = [
            {"bytes": coloured_jpeg(first + row, label), "path": f"{row}.jpg"} for row, label in enumerate(labels)
        ]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}-0.parquet", row_group_size=32)
    return folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory, mlflow_server) -> tuple[Path, str]:
    """An encoder file, and the MLflow run that it says it is of."""
    reference = create_run(uri=mlflow_server, experiment="pretraining", name="origin", params={}, tags={})
    finish_run(reference, status="FINISHED")
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    torch.manual_seed(3)
    save_encoder(path, build_encoder(ENCODER), Preprocessing(image_size=(64, 64)), source={"run_id": reference.run_id})
    return path, reference.run_id


@pytest.fixture(scope="module")
def finished(tmp_path_factory, origin, colours, mlflow_server) -> Finished:
    """One run to its end; the other runs are compared with it."""
    base = tmp_path_factory.mktemp("runs")
    arguments = ["--pretrained", str(origin[0]), "--data", str(colours), "--mlflow-uri", mlflow_server, *SHORT]
    done = run("demo_linear", "--output", base / "whole", *arguments, cwd=base, pipeline="linear_probe")
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(base / "whole", mlflow_server, arguments, done.stdout)


def test_the_head_trains_and_the_encoder_does_not_move(finished, origin):
    weights, before = finished.weights, safetensors.torch.load_file(origin[0])
    for name, value in before.items():
        assert torch.equal(value, weights[name]), name
    assert weights.keys() - before.keys() == {
        f"head.{name}"
        for name in (
            "linear.weight",
            "linear.bias",
            "norm.running_mean",
            "norm.running_var",
            "norm.num_batches_tracked",
        )
    }
    assert weights["head.norm.num_batches_tracked"] == 120  # 60 steps of two micro-batches
    optimizer = torch.load(finished.checkpoint / "optimizer.pt", weights_only=True)
    names = [name for group in optimizer["param_groups"] for name in group["names"]]
    assert sorted(names) == ["head.linear.bias", "head.linear.weight"]
    losses = [value for _, value in finished.curve("train/loss")]
    assert losses[-1] < losses[0]
    assert finished.state["metrics"]["final/top1"] > 0.6


def test_mlflow_holds_the_run_and_the_way_back(finished, origin):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished.server)
    seen = client.get_run(finished.state["mlflow"]["run_id"])
    assert (seen.info.status, seen.data.tags["stage"]) == ("FINISHED", "linear_probe")
    assert [step for step, _ in finished.curve("val/top1")] == [15, 30, 45, 60]
    assert seen.data.tags["pretrained.run_id"] == origin[1]
    assert client.get_run(origin[1]).data.tags[f"linear_probe.{seen.info.run_id}"] == "whole"


def test_its_checkpoints_are_classifiers(finished):
    state, base = finished.state, finished.output.parent
    for model, prefix in ((finished.output, "best"), (finished.checkpoint, "final")):
        done = run(model, "--output", base / prefix, cwd=base, pipeline="evaluate")
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = json.loads((base / prefix / "metrics.json").read_text())
        assert numbers["num_judged"] == 60
        assert numbers["top1"] == pytest.approx(state["metrics"][f"{prefix}/top1"])
        assert numbers["loss"] == pytest.approx(state["metrics"][f"{prefix}/loss"], rel=1e-4)


@pytest.mark.slow
def test_interrupted_and_continued_equals_uninterrupted(finished):
    base, output = finished.output.parent, finished.output.parent / "interrupted"
    arguments = ["demo_linear", "--output", str(output), *finished.arguments]
    program = command(*arguments, pipeline="linear_probe")
    status, text = interrupt(program, lambda: has_checkpoint(output), cwd=base)
    assert status == 130, text
    second = run(*arguments, cwd=base, pipeline="linear_probe")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Continuing" in second.stdout
    continued = Finished(output, finished.server, arguments, second.stdout).weights
    for name, value in finished.weights.items():
        assert torch.equal(value, continued[name]), name


def test_embeddings_of_two_processes_are_those_of_one(origin, photos, tmp_path):
    """80 image files, one of them broken."""
    files = []
    for workers in (1, 2):
        files.append(tmp_path / f"{workers}.parquet")
        arguments = (origin[0], "--data", photos, "--output", files[-1], "--workers", workers)
        done = run(*arguments, cwd=tmp_path, pipeline="embed")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "images/s" in done.stdout
    one, two = (pq.read_table(file) for file in files)
    assert len(one) == 79
    assert set(one["label"].to_pylist()) == {0, 1}
    for name in ("row", "path", "label"):
        assert one[name].equals(two[name]), name
    values = [torch.from_numpy(table["feature"].combine_chunks().flatten().to_numpy().copy()) for table in (one, two)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert one.schema.metadata == two.schema.metadata
    assert pq.read_metadata(files[1]).metadata[b"mixmae.broken"] == b"1"
