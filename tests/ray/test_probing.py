"""A linear probe through Ray Train, and embeddings through Ray Data, as a user runs them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from mixmae.convert import Preprocessing, save_encoder
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import SwinConfig
from mixmae.tracking import create_run, finish_run
from tests.ray.conftest import command, environment, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ENCODER = SwinConfig(
    image_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_sizes=(8, 8, 4, 2)
)
#: 60 steps are 16 epochs of 240 images.
SHORT = [
    *("--augment.image-size", "64", "--loop.batch-size", "64", "--loop.micro-batch-size", "32"),
    *("--loop.steps", "60", "--loop.log-every-steps", "5", "--optim.base-lr", "0.04"),
    *("--loop.panel-every-epochs", "4", "--loop.checkpoint-every-epochs", "4"),
]


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Shards of noise on a ground whose colour tells one of four classes: what random weights can tell apart."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 240), ("validation", 60)):
        labels, images = [row % 4 for row in range(count)], []
        for row, label in enumerate(labels):
            out = io.BytesIO()
            pixels = rng.integers(0, 120, (70, 80, 3)) + 40 * label * np.array([1, 0, -1]) + 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG")
            images.append({"bytes": out.getvalue(), "path": f"{row}.jpg"})
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
def finished(tmp_path_factory, origin, colours, mlflow_server) -> dict:
    base = tmp_path_factory.mktemp("runs")
    arguments = [
        "demo_linear",
        "--pretrained",
        str(origin[0]),
        "--data",
        str(colours),
        "--mlflow-uri",
        mlflow_server,
        *SHORT,
    ]
    done = run(*arguments, "--output", base / "whole", cwd=base, pipeline="linear_probe")
    assert done.returncode == 0, done.stdout + done.stderr
    return {"base": base, "arguments": arguments, "text": done.stdout, "server": mlflow_server}


def _state(finished: dict, name: str) -> dict:
    return json.loads((finished["base"] / name / "run.json").read_text())


def _weights(state: dict) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(state["checkpoint"]) / "model.safetensors")


def test_the_head_trains_and_the_encoder_does_not_move(finished, origin):
    state = _state(finished, "whole")
    weights, before = _weights(state), safetensors.torch.load_file(origin[0])
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
    optimizer = torch.load(Path(state["checkpoint"]) / "optimizer.pt", weights_only=True)
    names = [name for group in optimizer["param_groups"] for name in group["names"]]
    assert sorted(names) == ["head.linear.bias", "head.linear.weight"]
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in finished["text"].splitlines() if "lr " in line]
    assert losses[-1] < losses[0]
    assert state["metrics"]["final/top1"] > 0.6


def test_mlflow_holds_the_run_and_the_way_back(finished, origin):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished["server"])
    seen = client.get_run(_state(finished, "whole")["mlflow"]["run_id"])
    assert (seen.info.status, seen.data.tags["stage"]) == ("FINISHED", "linear_probe")
    assert [point.step for point in client.get_metric_history(seen.info.run_id, "val/top1")] == [15, 30, 45, 60]
    assert seen.data.tags["pretrained.run_id"] == origin[1]
    assert client.get_run(origin[1]).data.tags[f"linear_probe.{seen.info.run_id}"] == "whole"


def test_its_checkpoints_are_classifiers(finished):
    state, base = _state(finished, "whole"), finished["base"]
    for model, prefix in ((base / "whole", "best"), (Path(state["checkpoint"]), "final")):
        done = run(model, "--output", base / prefix, cwd=base, pipeline="evaluate")
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = json.loads((base / prefix / "metrics.json").read_text())
        assert numbers["num_judged"] == 60
        assert numbers["top1"] == pytest.approx(state["metrics"][f"{prefix}/top1"])
        assert numbers["loss"] == pytest.approx(state["metrics"][f"{prefix}/loss"], rel=1e-4)


def test_interrupted_and_continued_equals_uninterrupted(finished):
    base = finished["base"]
    arguments = [*finished["arguments"], "--output", base / "interrupted"]
    first = subprocess.Popen(
        command(*arguments, pipeline="linear_probe"),
        cwd=base,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step 20/"):  # the first checkpoint is step 15
            first.send_signal(signal.SIGINT)
            break
    rest, errors = first.communicate(timeout=200)
    assert first.returncode == 130, rest + errors
    second = run(*arguments, cwd=base, pipeline="linear_probe")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Continuing" in second.stdout
    whole, continued = (_weights(_state(finished, name)) for name in ("whole", "interrupted"))
    for name, value in whole.items():
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
