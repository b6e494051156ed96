"""What a sweep leaves in MLflow's registry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixmae.jobs.in_process import build_seeded
from mixmae.jobs.segmenter import load_segmenter
from mixmae.segmentation.predictor import PixelPredictor
from mixmae.tracking import claim_model_name, create_run, finish_run
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.loop import TrainState
from pipelines.sweeping.parent import register
from tests.unit.jobs.test_segmentation import job_on, scenes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_best_segmenter_needs_none_of_our_code(tmp_path, mlflow_db):
    """Loaded in a process that cannot import mixmae, it gives the same classes, and knows their names."""
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = job_on(scenes(tmp_path / "set", 4), tmp_path / "sweep")
    model = build_seeded(job).eval()
    with torch.no_grad():
        model.head.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    state = job.describe() | {"position": vars(TrainState(step=1))}
    save_checkpoint(tmp_path / "sweep" / "best", model=model, optimizer=None, state=state)
    run = create_run(uri=uri, experiment="sweeps", name="tiny", params={}, tags={})
    finish_run(run, status="FINISHED")
    claim_model_name(uri, "tiny", "segmenter")
    shared: Any = SimpleNamespace(job=job, folder=tmp_path / "sweep", run=run)
    assert register(shared, run.run_id, "tiny") == "1"

    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = f"""
import sys, numpy, mlflow
sys.modules["mixmae"] = sys.modules["pipelines"] = None
mlflow.set_tracking_uri({uri!r})
model = mlflow.pyfunc.load_model("models:/tiny@best")
numpy.save("classes.npy", model.predict(numpy.load("images.npy")))
print(model.metadata.metadata["classes"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(list(job.classes))
    segmenter = load_segmenter(tmp_path / "sweep" / "best", device="cpu")
    with torch.no_grad():
        expected = PixelPredictor(segmenter.model, mean=segmenter.mean, std=segmenter.std)(torch.from_numpy(images))
    found = np.load(tmp_path / "classes.npy")
    assert found.dtype == np.uint8
    assert found.shape == (5, 64, 64)
    assert len(np.unique(found)) > 1
    assert (found == expected.numpy()).mean() > 0.999
    # The same classes as predict.py writes for an image of the size that it is resized to.
    (own,) = segmenter.predict([images[0].transpose(1, 2, 0)])
    assert (own == found[0]).mean() > 0.999
