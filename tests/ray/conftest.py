"""Real runs of the pipelines, as a user starts them: a process of its own, a real MLflow server, real files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from mixmae.data.shards.scenes import DENSE, draw
from mixmae.data.shards.write import StoredImage, shard_schema, write_shard
from mixmae.encoders.swin import SwinConfig
from mixmae.training.checkpoint import list_checkpoints
from tests.mlflow_server import environment, serve_mlflow

ROOT = Path(__file__).parents[2]

ENCODER = SwinConfig(
    image_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_sizes=(8, 8, 4, 2)
)
TINY = [
    *("--augment.image-size", "64", "--encoder.embed-dim", "16"),
    *("--encoder.depths", "1", "1", "1", "1", "--encoder.window-sizes", "8", "8", "4", "2"),
    *("--encoder.num-heads", "1", "2", "4", "8", "--method.decoder.dim", "32", "--method.decoder.depth", "1"),
    *("--loop.batch-size", "16", "--loop.steps", "60", "--loop.log-every-steps", "5", "--optim.base-lr", "0.05"),
]
"""The demo recipe with ENCODER, cut down to seconds."""


def command(*arguments: object, pipeline: str = "pretrain") -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / f"{pipeline}.py"), *map(str, arguments)]


def run(
    *arguments: object, cwd: Path, timeout_s: float = 400, pipeline: str = "pretrain"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, pipeline=pipeline),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True)
class Finished:
    """A run that was started as a user does, and what it left."""

    output: Path
    server: str
    arguments: list[str]
    text: str
    """What it printed."""

    @property
    def state(self) -> dict:
        return json.loads((self.output / "run.json").read_text(encoding="utf-8"))

    @property
    def checkpoint(self) -> Path:
        return Path(self.state["checkpoint"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.checkpoint / "model.safetensors")

    def curve(self, name: str) -> list[tuple[int, float]]:
        """The points (step, value) that MLflow has of a metric, in the order of their steps."""
        from mlflow import MlflowClient

        history = MlflowClient(tracking_uri=self.server).get_metric_history(self.state["mlflow"]["run_id"], name)
        return sorted((point.step, point.value) for point in history)

    @property
    def artifacts(self) -> set[str]:
        """The files that MLflow has of the run."""
        from mlflow import MlflowClient

        run_id = self.state["mlflow"]["run_id"]
        return {item.path for item in MlflowClient(tracking_uri=self.server).list_artifacts(run_id)}


def interrupt(
    program: list[str], when: Callable[[], bool], *, how: signal.Signals = signal.SIGINT, cwd: Path
) -> tuple[int, str]:
    """Start a program and send it a signal as soon as `when` is true.   Returns: exit status and what it printed."""
    with subprocess.Popen(
        program, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while not when():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(how)
        text, _ = process.communicate(timeout=200)
        return process.returncode, text


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint on the disk."""
    return bool(list_checkpoints(run / "checkpoints"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 image files in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(80):
        height, width = rng.integers(40, 120, size=2)
        low = rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(low).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        place = folder / ("a" if index % 2 else "b")
        place.mkdir(exist_ok=True)
        suffix = "png" if index % 5 == 0 else "jpg"
        picture.save(place / f"{index:03d}.{suffix}")
    (folder / "a" / "001.jpg").write_bytes((folder / "a" / "001.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the built-in set's first scenes, 160 for training and 40 of its validation: quick to judge."""
    folder = tmp_path_factory.mktemp("few_scenes")
    for split, numbers in (("train", range(160)), ("validation", range(2000, 2040))):
        scenes = ((number, draw(0, number)) for number in numbers)
        images = [StoredImage(scene.jpeg, f"{number}.jpg", truth=scene.truth) for number, scene in scenes]
        write_shard(folder / f"{split}-00000-of-00001.parquet", images, shard_schema(None, dense=DENSE))
    return folder


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real tracking server with its own database and artifact folder; yields its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    with serve_mlflow(f"sqlite:///{folder}/mlflow.db", folder) as address:
        yield address
