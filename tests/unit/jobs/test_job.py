"""What all jobs have in common: they travel, and a sweep's trials are made of one."""

from __future__ import annotations

from dataclasses import replace

import cloudpickle
import pytest

from mixmae.data.sources import open_source
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.job import PLAIN_NAMES, Job
from mixmae.jobs.linear_probe import LinearProbeJob
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.record import Pretrained
from mixmae.tracking import RunRef
from pipelines.recipes import FINETUNE_RECIPES, LINEAR_PROBE_RECIPES, PRETRAIN_RECIPES

REF = RunRef(uri="sqlite:////runs/mlflow.db", experiment_id="1", run_id="8")
PRETRAINED = Pretrained(path="/runs/demo", digest="ab", run_id="7")


@pytest.fixture(params=[PretrainJob, ClassificationJob, LinearProbeJob])
def job(request, shards, tmp_path) -> Job:
    """One of each kind, on 120 images of four classes."""
    source = open_source(shards("set", [row % 4 for row in range(120)]))
    options = {"data": None, "folder": tmp_path / "run"}
    if request.param is PretrainJob:
        return PretrainJob.of(PRETRAIN_RECIPES["demo"](), source, source, **options)
    recipes = FINETUNE_RECIPES if request.param is ClassificationJob else LINEAR_PROBE_RECIPES
    config = next(iter(recipes.values()))()
    config = replace(config, loop=replace(config.loop, batch_size=16, micro_batch_size=None))
    return request.param.of(config, source, source, **options, pretrained=PRETRAINED)


def test_what_travels_to_the_workers_is_the_librarys(job):
    """Nothing of a pipeline, which may run as __main__."""
    pickled = cloudpickle.dumps(replace(job, run=REF))
    assert b"pipelines" not in pickled
    assert b"__main__" not in pickled
    assert cloudpickle.loads(pickled).describe() == replace(job, run=REF).describe()


def test_a_trial_differs_in_its_config_and_its_folder_alone(job, tmp_path):
    config = replace(job.config, window_rows=77)
    trial = job.of_trial(config, tmp_path / "trial")
    assert (trial.config, trial.folder) == (config, tmp_path / "trial")
    assert trial.data == replace(job.data, window_rows=77)
    assert replace(trial, config=job.config, folder=job.folder, data=job.data) == job


def test_all_runs_have_the_same_numbers_to_be_compared_by(job):
    params = job.params
    assert params.keys() >= {*PLAIN_NAMES.values(), "lr", "steps", "image_size", "params_m", "gmacs"}
    assert all(isinstance(params[name], int | float) for name in PLAIN_NAMES.values())
    assert params["encoder"]["image_size"] == job.config.augment.image_size
    assert job.tags["stage"] == job.stage
    if isinstance(job, ClassificationJob):
        assert (params["classes"], job.tags["pretrained.run_id"]) == (4, "7")
