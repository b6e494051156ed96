"""The record of a run: the same from run.json as in memory, of files of earlier versions too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmae.data.sources import open_source
from mixmae.jobs.record import DataRecord, Pretrained, RunRecord, read_begun, read_record
from mixmae.tracking import RunRef
from mixmae.training.run_folder import RunFolder
from pipelines.recipes import PRETRAIN_RECIPES

FULL = RunRecord(
    status="finished",
    recipe="demo_finetune",
    config={"loop": {"seed": 1}},
    pretrained=Pretrained(path="/runs/demo", digest="ab", run_id="7"),
    classes=["cat", "dog"],
    cached=True,
    space={"vary": {"optim.layer_decay": [0.7]}},
    trial={"optim.layer_decay": 0.7},
    data=DataRecord(name="pets", digest="cd", source="/data/pets", window_rows=1024),
    mlflow=RunRef(uri="sqlite:////runs/mlflow.db", experiment_id="1", run_id="8"),
    checkpoint="/runs/pets/checkpoints/step_0000040",
    metrics={"loss": 0.5},
    reason="none",
)


def test_a_record_survives_its_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert read_record(folder) is None
    for record in (FULL, RunRecord(status="running", config={"loop": {}})):
        folder.write(record.to_json())
        assert read_record(folder) == record
    assert set(RunRecord(status="running", config={}).to_json()) == {"status", "recipe", "config"}


def test_a_file_of_an_earlier_version(tmp_path):
    """As finetune.py wrote it before there were record types: None where a run had no pretrained weights."""
    content = {
        "status": "running",
        "recipe": "demo_finetune",
        "config": {"resize_share": 0.9, "loop": {"panel_every_epochs": 2.0}},
        "pretrained": None,
        "classes": ["0", "1"],
        "data": {"name": "set", "digest": "cd", "source": "built-in", "window_rows": 16384},
        "mlflow": {"uri": "sqlite:////runs/mlflow.db", "experiment_id": "1", "run_id": "8"},
    }
    (tmp_path / "run.json").write_text(json.dumps(content))
    record = read_record(RunFolder(tmp_path))
    assert record is not None
    assert record.config == {"crop_pct": 0.9, "loop": {"evaluate_every_epochs": 2.0}}
    assert (record.pretrained, record.classes) == (None, ["0", "1"])
    assert record.data == DataRecord(name="set", digest="cd", source="built-in", window_rows=16384)
    assert record.mlflow == RunRef(uri="sqlite:////runs/mlflow.db", experiment_id="1", run_id="8")


def test_a_run_that_never_trained_binds_nobody(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write(RunRecord(status="preparing", config={}).to_json())
    assert read_record(folder) is not None
    assert read_begun(folder) is None


@pytest.mark.parametrize(
    ("data", "source"), [(None, "moths"), ("shapes", "shapes"), ("moths:0.6", "moths:0.6"), ("./moths", "/here/moths")]
)
def test_a_built_in_set_is_recorded_by_its_name_and_a_place_as_a_path(data, source, shards, tmp_path, monkeypatch):
    folder = shards("set", [0, 1] * 10)
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/here") / path)
    record = DataRecord.of(open_source(folder), data, PRETRAIN_RECIPES["demo"]())
    assert record.source == source
