"""Pretraining end to end: a real Ray cluster, a real MLflow server, real image files, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mixmae.data.prepare import open_for_training
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.supervised import HELDOUT_IMAGES
from mixmae.machine import usable_cores
from pipelines.command import recipe_command
from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES
from tests.ray.conftest import TINY, Finished, command, has_checkpoint, interrupt, run
from tests.unit.conftest import coloured_jpeg

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

LOOSE = ["--loop.max-broken-fraction", "0.2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos, mlflow_server) -> Finished:
    """One run to its end; the other runs are compared with it."""
    base = tmp_path_factory.mktemp("runs")
    arguments = ["--data", str(photos), "--mlflow-uri", mlflow_server, "--workers", "1", *TINY, *LOOSE]
    done = run("demo", "--output", base / "whole", *arguments, cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(base / "whole", mlflow_server, arguments, done.stdout)


def test_the_run_says_what_it_did(finished):
    assert "step 60/60" in finished.text
    assert "images/s" in finished.text
    assert "waiting for data" in finished.text
    for line in ("checkpoint", "panel", "MLflow UI"):
        assert f"\n{line} " in finished.text
    assert "a/001.jpg" in (finished.output / "broken_images.jsonl").read_text()
    assert finished.state["status"] == "finished"


def test_loss_falls(finished):
    losses = [value for _, value in finished.curve("train/loss")]
    assert losses[-1] < losses[0] - 0.02  # noise, a model of a few thousand weights, 60 steps


def test_without_ray_the_weights_are_the_same(finished, photos, tmp_path):
    """What compare.py and few_labels.py train is what a run trains."""
    chosen: list[PretrainConfig] = []

    def choose(arguments: Arguments, recipe: str) -> int:
        chosen.append(arguments.config)
        return 0

    recipe_command(choose, Arguments, ["demo", *TINY, *LOOSE], program="", about="", recipes=PRETRAIN_RECIPES)
    source, heldout = open_for_training(str(photos), tmp_path, HELDOUT_IMAGES)
    job = PretrainJob.of(chosen[0], source, heldout, data=None, folder=tmp_path)
    torch.set_num_threads(usable_cores())  # as the run's worker: threads add in another order
    try:
        model = build_seeded(job)
        assert train_in_process(job, model).step == 60
    finally:
        torch.set_num_threads(1)  # as tests/conftest.py
    assert all(torch.equal(value, finished.weights[name]) for name, value in model.state_dict().items())


def test_mlflow_holds_the_run(finished):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished.server)
    seen = client.get_run(finished.state["mlflow"]["run_id"])
    assert seen.info.status == "FINISHED"
    params = seen.data.params
    assert float(params["optim.base_lr"]) > 0
    assert float(params["lr"]) == pytest.approx(float(params["optim.base_lr"]) * 16 / 256)
    assert int(params["batch_size"]) == 16
    assert float(params["gmacs"]) > 0
    assert {
        "train/loss",
        "train/lr",
        "train/epoch",
        "perf/images_per_s",
        "perf/data_wait_share",
        "heldout/loss",
    } <= set(seen.data.metrics)
    # The folder's two classes, from the untrained encoder on.
    assert "of 2 classes" in finished.text
    assert seen.data.tags["probe"] in finished.text
    looks = {point.step for point in client.get_metric_history(seen.info.run_id, "heldout/loss")}
    for name in ("probe/knn_top1", "probe/linear_top1"):
        curve = {point.step: point.value for point in client.get_metric_history(seen.info.run_id, name)}
        assert set(curve) == {0, *looks}, name
        assert all(0 <= value <= 1 for value in curve.values()), name
    assert "evaluation after step 0: probe/knn_top1" in finished.text
    for name in ("knn_untrained", "linear_untrained", "knn_pixels", "linear_pixels", "chance"):
        line = {p.step: p.value for p in client.get_metric_history(seen.info.run_id, f"reference/{name}")}
        assert set(line) == {0, *looks}, name
        assert len(set(line.values())) == 1, name
    last_line = finished.text.strip().splitlines()[-1]
    assert last_line.startswith("kNN ")
    assert f"(untrained encoder {seen.data.metrics['reference/knn_untrained']:.1%}, raw pixels " in last_line
    assert seen.data.tags["mlflow.note.content"].count("](") == 2  # the curves and the newest panel
    history = client.get_metric_history(seen.info.run_id, "train/loss")
    assert sorted({point.step for point in history}) == [1, *range(5, 61, 5)]
    assert any(name.startswith("system/") for name in seen.data.metrics)
    assert seen.inputs.dataset_inputs[0].dataset.digest == finished.state["data"]["digest"]
    assert len(seen.data.tags.get("mlflow.source.git.commit", "")) >= 40
    assert seen.data.tags["checkpoint"] == finished.state["checkpoint"]
    images = [item.path for item in client.list_artifacts(seen.info.run_id, "images")]
    assert len(images) >= 4
    artifacts = {item.path for item in client.list_artifacts(seen.info.run_id)}
    assert {"config.json", "broken_images.jsonl", "probe.png", "reconstruction.png"} <= artifacts
    assert (finished.output / "probe.png").is_file()


def test_a_checkpoint_says_all_that_a_reader_needs(finished):
    state = json.loads((Path(finished.state["checkpoint"]) / "state.json").read_text())
    assert state["position"]["step"] == 60
    assert state["position"]["images_seen"] == 960
    assert state["config"]["encoder"]["embed_dim"] == 16
    assert state["mlflow"]["run_id"] == finished.state["mlflow"]["run_id"]
    assert state["versions"]["torch"] == torch.__version__
    assert state["data"]["digest"] == finished.state["data"]["digest"]
    assert any(name.startswith("decoder.") for name in finished.weights)


def test_a_finished_run_started_again_does_nothing(finished):
    before = Path(finished.state["checkpoint"]).stat().st_mtime
    again = run("demo", "--output", finished.output, *finished.arguments, cwd=finished.output.parent)
    assert again.returncode == 0
    assert "finished" in again.stdout
    assert Path(finished.state["checkpoint"]).stat().st_mtime == before


def test_another_model_in_the_same_output_is_refused(finished):
    again = run(
        "demo",
        "--output",
        finished.output,
        *finished.arguments,
        "--encoder.embed-dim",
        "32",
        cwd=finished.output.parent,
    )
    assert again.returncode == 1
    assert "encoder.embed_dim was 16 and is 32" in again.stderr


def test_interrupted_and_continued_equals_uninterrupted(finished):
    """Ctrl-C in the middle, then the same command: the same weights, bit for bit, and one MLflow run."""
    output = finished.output.parent / "interrupted"
    program = command("demo", "--output", output, *finished.arguments)
    status, text = interrupt(program, lambda: has_checkpoint(output), cwd=output.parent)
    assert status == 130, text
    assert "The same command continues" in text
    assert json.loads((output / "run.json").read_text())["status"] == "running"

    second = run("demo", "--output", output, *finished.arguments, cwd=output.parent)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Continuing" in second.stdout
    continued = Finished(output, finished.server, finished.arguments, second.stdout)
    assert [step for step, _ in continued.curve("train/loss")].count(1) == 1  # it did not begin anew
    for name, value in finished.weights.items():
        assert torch.equal(value, continued.weights[name]), name

    for name in ("probe/knn_top1", "reference/knn_untrained", "reference/linear_pixels"):  # nor was step 0 lost
        points = dict(finished.curve(name))
        assert dict(continued.curve(name)) == points, name
        assert [step for step, _ in continued.curve(name)].count(0) == 1, name

    from mlflow import MlflowClient

    seen = MlflowClient(tracking_uri=finished.server).get_run(continued.state["mlflow"]["run_id"])
    assert seen.info.status == "FINISHED"


@pytest.mark.parametrize(
    "flags", [pytest.param((), id="ddp"), pytest.param(("--loop.shard",), id="sharded", marks=pytest.mark.slow)]
)
def test_two_workers_compute_what_one_does(finished, flags):
    output = finished.output.parent / f"two{len(flags)}"
    done = run("demo", "--output", output, *finished.arguments, "--workers", "2", *flags, cwd=output.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    two = Finished(output, finished.server, finished.arguments, done.stdout)
    assert two.state["metrics"]["loss"] == pytest.approx(finished.state["metrics"]["loss"], rel=1e-3)
    assert two.state["metrics"]["broken_images"] == finished.state["metrics"]["broken_images"]
    first, other = (run.curve("train/loss")[0][1] for run in (finished, two))
    assert other == pytest.approx(first, rel=1e-5)


def test_broken_images_are_left_out_of_the_evaluation_and_stop_a_run_that_has_hardly_others(tmp_path):
    """Two workers; the images that are looked at before the run are whole."""
    whole = {32 * chunk + row for chunk in range(4) for row in np.linspace(0, 31, 8).astype(int).tolist()}
    for split, count, broken in (("train", 128, set(range(128)) - whole), ("validation", 60, {1, 2, 50, 51})):
        rows = [
            {"bytes": b"no image" if row in broken else coloured_jpeg(row, row % 4), "path": f"{row}.jpg"}
            for row in range(count)
        ]
        table = pa.table({"image": rows, "label": [row % 4 for row in range(count)]})
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=32)
    flags = [*TINY, "--loop.log-every-steps", "50", "--workers", "2", "--probe.images", "60", "--probe.k", "5"]
    done = run("demo", "--data", tmp_path, "--output", tmp_path / "runs" / "stopped", *flags, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left out of the evaluation: 4 images could not be used (" in done.stdout
    assert "validation-0.parquet#1 / 1.jpg: not an image" in done.stdout
    assert "of the first 64 images could not be used, for example " in done.stderr
    assert "Traceback" not in done.stderr
    ledger = (tmp_path / "runs" / "stopped" / "broken_images.jsonl").read_text(encoding="utf-8")
    assert len(ledger.splitlines()) > 32


@pytest.mark.slow
def test_an_odd_environment(photos, tmp_path, monkeypatch):
    """A TMPDIR too long for sockets, no home, empty variables, an ASCII locale, and paths with odd letters."""
    data, output = tmp_path / "dät #1", tmp_path / "rüns 50% #2" / "rün %41?"
    shutil.copytree(photos, data)
    temporary = tmp_path / ("x" * 110)
    temporary.mkdir()
    for name, value in {
        **dict.fromkeys(("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "XDG_CACHE_HOME"), ""),
        **{"TMPDIR": str(temporary), "HOME": "/nonexistent"},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }.items():
        monkeypatch.setenv(name, value)
    flags = [*TINY, *LOOSE, "--loop.steps", "4", "--workers", "1"]
    program = command("demo", "--data", data, "--output", output, *flags)
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"checkpoint  {output}/checkpoints/step_0000004" in done.stdout
    assert (output.parent / "mlflow.db").is_file()
