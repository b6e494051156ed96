"""A sweep end to end, killed without a word in its middle and started again: a real Ray, a real MLflow server."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from mixmae.convert import Preprocessing, read_weights, save_encoder
from mixmae.encoders.swin import SwinEncoder
from mixmae.training.run_folder import weights_of
from tests.mlflow_server import environment
from tests.ray.conftest import ENCODER, ROOT, TINY, has_checkpoint, interrupt, run
from tests.ray.sweeps import SHORT, sweep_command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NUMBERS = (
    *("layer_decay", "drop_path", "lr", "weight_decay", "epochs", "batch_size", "image_size", "seed"),
    *("params_m", "gmacs"),
)
METRICS = [f"{group}/{name}" for group in ("final", "best") for name in ("top1", "top5", "loss")]


@dataclass(frozen=True)
class Swept:
    output: Path
    server: str
    arguments: list[str]
    kept: dict[Path, int]
    """When the weights of the trials were written that were finished before the kill."""
    text: str
    """What the second start printed."""

    @property
    def state(self) -> dict:
        return json.loads((self.output / "run.json").read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory, photos, mlflow_server) -> Swept:
    base = tmp_path_factory.mktemp("sweeps")
    torch.manual_seed(3)
    preprocessing = Preprocessing(image_size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    save_encoder(base / "encoder.safetensors", SwinEncoder(ENCODER), preprocessing)
    arguments = ["--data", str(photos), "--mlflow-uri", mlflow_server, *SHORT]
    arguments += ["--pretrained", str(base / "encoder.safetensors"), "--output", str(base / "sweep")]
    arguments += ["--register-model", "tiny", "--max-concurrent", "1"]
    program = sweep_command(*arguments)
    for finished in (0, 2):  # in the reference, which is the first trial, and later in another one
        when = partial(is_under_way, base / "sweep", finished)
        status, killed = interrupt(program, when, how=signal.SIGKILL, cwd=ROOT)
        assert status == -signal.SIGKILL, killed
    kept = {file: file.stat().st_mtime_ns for file in weights_of_finished(base / "sweep")}
    again = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, killed + again.stdout + again.stderr
    return Swept(base / "sweep", mlflow_server, arguments, kept, again.stdout)


def weights_of_finished(sweep: Path) -> list[Path]:
    """The last weights of the trials that are finished."""
    records = [json.loads(file.read_text()) for file in (sweep / "trials").glob("*/run.json")]
    return [Path(record["checkpoint"]) / "model.safetensors" for record in records if record["status"] == "finished"]


def is_under_way(sweep: Path, finished: int) -> bool:
    """Whether so many trials are finished and the next one has a checkpoint."""
    trials = list((sweep / "trials").glob("*/run.json"))
    going = [file.parent for file in trials if json.loads(file.read_text())["status"] != "finished"]
    return len(trials) == finished + 1 and len(going) == 1 and has_checkpoint(going[0])


def children(swept: Swept) -> list:
    """The runs of the trials, without the reference."""
    return [run for run in all_children(swept) if "reference" not in run.data.tags]


def all_children(swept: Swept) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=swept.server)
    parent = swept.state["mlflow"]
    return client.search_runs([parent["experiment_id"]], f"tags.mlflow.parentRunId = '{parent['run_id']}'")


def test_every_trial_is_there_exactly_once(swept):
    assert "Continuing tiny: 4 trials and a reference from scratch" in swept.text
    assert "finished (5 of 5" in swept.text
    assert len(swept.kept) == 2
    assert swept.kept.items() <= {file: file.stat().st_mtime_ns for file in weights_of_finished(swept.output)}.items()
    found = children(swept)
    settings = sorted((float(run.data.params["layer_decay"]), float(run.data.params["drop_path"])) for run in found)
    assert settings == [(0.7, 0.0), (0.7, 0.1), (0.8, 0.0), (0.8, 0.1)]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len(list((swept.output / "trials").iterdir())) == len(all_children(swept)) == 5


def test_the_trial_that_was_under_way_continues_from_its_checkpoint(swept):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=swept.server)
    counts = []
    for trial in all_children(swept):
        steps = [point.step for point in client.get_metric_history(trial.info.run_id, "train/loss")]
        assert sorted(set(steps)) == [1, *range(4, 33, 4)]
        counts.append(steps.count(1))
    assert counts == [1] * 5  # step 1 was logged once: none began anew


def test_all_trials_have_the_same_numbers(swept):
    """The parallel coordinates of MLflow's page show a run only if it has every chosen key, as a number."""
    for trial in all_children(swept):
        for key in NUMBERS:
            float(trial.data.params[key])
        assert set(METRICS) <= set(trial.data.metrics)
        assert trial.data.tags["stage"] == "finetune"


def test_the_parent_holds_what_came_of_it(swept):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=swept.server)
    parent = client.get_run(swept.state["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"results.csv", "results.json", "heat_map.png", "curves.png", "best_config.json"} <= artifacts
    best = client.get_run(parent.data.tags["best.run_id"])
    assert parent.data.tags["best.layer_decay"] == best.data.params["layer_decay"]
    assert parent.data.metrics["best/top1"] == best.data.metrics["best/top1"]
    assert parent.data.metrics["final/top1"] == max(run.data.metrics["final/top1"] for run in children(swept))
    assert best.data.tags["rank"] == "1"
    assert "[model tiny, version 1](#/models/tiny/versions/1" in parent.data.tags["mlflow.note.content"]
    assert "layer_decay" not in parent.data.params  # its metrics are not those of the recipe's value


def test_the_table_ranks_the_trials(swept):
    with (swept.output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "reference"]
    values = [float(row["final/top1"]) for row in rows[:-1]]
    assert values == sorted(values, reverse=True)
    config = json.loads((swept.output / "best_config.json").read_text())
    assert config["optim"]["layer_decay"] == float(rows[0]["optim.layer_decay"])
    assert config["encoder"]["drop_path"] == float(rows[0]["encoder.drop_path"])
    assert (swept.output / "best").resolve() == (swept.output / "trials" / rows[0]["trial"] / "best").resolve()
    assert (swept.output / "best" / "model.safetensors").is_file()


def test_the_reference_is_from_scratch_and_beside_the_others(swept):
    from mlflow import MlflowClient

    (reference,) = (run for run in all_children(swept) if "reference" in run.data.tags)
    assert reference.info.run_name == reference.data.tags["reference"] == "from scratch"
    assert reference.data.tags["pretrained"] == "none"
    assert "rank" not in reference.data.tags
    assert (reference.data.params["layer_decay"], reference.data.params["optim.layer_decay"]) == ("1.0", "none")
    firsts = [first_norm(swept, run) for run in children(swept) if float(run.data.params["drop_path"]) == 0]
    assert len(firsts) == 2
    assert len(set(firsts)) == 1
    assert first_norm(swept, reference) not in firsts  # the same images and settings, other weights
    parent = MlflowClient(tracking_uri=swept.server).get_run(swept.state["mlflow"]["run_id"])
    note = parent.data.tags["mlflow.note.content"]
    best, scratch = (run.data.metrics["final/top1"] for run in (parent, reference))
    shown = f"final/top1 {best:.2%}, from scratch {scratch:.2%}"
    assert f"{shown}**" in note.partition("\n")[0]
    assert "\n| reference | None | 0 |" in note
    assert shown in swept.text
    assert "points may be noise (2 standard errors of a difference on" in note
    assert "points may be noise (2 standard errors of a difference on" in swept.text


def first_norm(swept: Swept, run) -> float:
    """Of the gradient in the first step."""
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=swept.server).get_metric_history(run.info.run_id, "train/grad_norm")
    return next(point.value for point in history if point.step == 1)


def test_the_winner_is_a_registered_model_that_needs_none_of_our_code(swept, tmp_path):
    """Loaded in a process that cannot import mixmae, it says what the checkpoint says, for any number of images."""
    import numpy as np

    from mixmae.finetune.classification import Predictor
    from mixmae.inference import load_classifier

    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = f"""
import sys, numpy, mlflow
sys.modules["mixmae"] = sys.modules["pipelines"] = None
mlflow.set_tracking_uri({swept.server!r})
model = mlflow.pyfunc.load_model("models:/tiny@best")
numpy.save("probabilities.npy", model.predict(numpy.load("images.npy")))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), check=True)
    classifier = load_classifier(swept.output / "best", device="cpu")
    preprocessing = classifier.metadata.preprocessing
    predictor = Predictor(classifier.model, mean=preprocessing.mean, std=preprocessing.std)
    with torch.no_grad():
        expected = predictor(torch.from_numpy(images))
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), expected, rtol=1e-4, atol=1e-6)


def test_started_again_it_does_nothing(swept):
    again = subprocess.run(sweep_command(*swept.arguments), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout
    assert "trial" not in again.stdout.replace("trials", "")


def test_another_space_or_start_in_the_same_output_is_refused(swept):
    def refused(*arguments: str) -> str:
        program = [sys.executable, str(ROOT / "pipelines" / "sweep.py"), "demo", "--loop.epochs", "15"]
        program += ["--loop.warmup-epochs", "1", *swept.arguments, *arguments]
        done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        return done.stderr

    assert "the search space is another one" in refused()


def test_pretraining_is_swept_and_judged_by_its_probe(photos, mlflow_server, tmp_path):
    """An ablation: its trials are pretraining runs, ranked by the linear probe; the best encoder can be taken on."""
    from mlflow import MlflowClient

    flags = ["--data", photos, "--mlflow-uri", mlflow_server, "--output", tmp_path / "ablation", *TINY]
    flags += ["--loop.steps", "12", "--loop.max-broken-fraction", "0.2", "--probe.images", "60", "--probe.k", "5"]
    done = run("demo_pretrain", *flags, cwd=tmp_path, pipeline="sweep", timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "ablation" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = sorted((row["method.num_images"], row["method.unmixing"]) for row in rows)
    assert settings == [("2", "attention"), ("2", "none"), ("4", "attention"), ("4", "none")]
    values = [float(row["final/linear_top1"]) for row in rows]
    assert values == sorted(values, reverse=True)
    client = MlflowClient(tracking_uri=mlflow_server)
    for row in rows:
        trial = client.get_run(row["run_id"])
        assert trial.info.status == "FINISHED"
        assert trial.data.tags["stage"] == "pretrain"
        assert trial.data.params["method.num_images"] == row["method.num_images"]
        for key in ("final/loss", "final/heldout_loss", "final/knn_top1", "final/linear_top1"):
            assert trial.data.metrics[key] == pytest.approx(float(row[key]))
    best = read_weights(weights_of(tmp_path / "ablation"))
    state = json.loads((tmp_path / "ablation" / "best" / "state.json").read_text())
    assert state["mlflow"]["run_id"] == rows[0]["run_id"]
    assert str(state["config"]["method"]["num_images"]) == rows[0]["method.num_images"]
    assert best.metadata is not None
