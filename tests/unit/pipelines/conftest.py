"""What tests of the command lines share: weights, no cluster, and the sentence that a mistake ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixmae.convert import Preprocessing, load_encoder, save_encoder
from mixmae.data.blocks import eval_batches
from mixmae.data.sources import open_source
from mixmae.finetune.classification import ImageClassifier
from mixmae.probing.features import extract_features
from mixmae.training import cluster
from pipelines import knn, run
from tests.factories import tiny_swin

MEAN = (0.4, 0.5, 0.6)
"""Pixel mean of `weights`."""


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file with an encoder of random weights."""
    path = tmp_path / "weights" / "encoder.safetensors"
    torch.manual_seed(0)
    save_encoder(path, tiny_swin(64), Preprocessing(image_size=(64, 64), mean=MEAN))
    return path


@pytest.fixture
def classifier(tmp_path) -> Path:
    """A file with a classifier of four classes."""
    path = tmp_path / "classifier.safetensors"
    save_encoder(path, ImageClassifier(tiny_swin(), 4), Preprocessing(image_size=(96, 96)))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """The address of an MLflow store."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def here(monkeypatch, tmp_path, store) -> Path:
    """The working folder of commands that write to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tmp_path


def library_features(weights: Path, data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of a split, by the library alone."""
    encoder, metadata = load_encoder(weights)
    preprocessing = metadata.preprocessing
    batches = eval_batches(open_source(data, split), preprocessing.image_size, batch_size=7)
    return extract_features(encoder, batches, mean=preprocessing.mean, std=preprocessing.std)


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Any attempt to start Ray or MLflow fails the test: these errors must come first."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached the cluster or MLflow")

    monkeypatch.chdir(tmp_path)  # the default output is below the working directory
    monkeypatch.setattr(cluster, "connect", refuse)
    for module, name in ((run, "create_run"), (run, "start_sending"), (knn, "create_run")):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def error(capsys) -> Callable[..., str]:
    """Runs a command that must fail: error(main, *arguments, code=1) is what it prints on stderr, in one line."""

    def fail(main: Callable[[list[str]], int], *argv: object, code: int = 1) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(item) for item in argv])
        assert stop.value.code == code
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return " ".join(text.replace("│", " ").split())  # mistakes of the command line come in a box

    return fail
