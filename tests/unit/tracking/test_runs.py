"""What needs no server; the rest is tested against a real one in tests/ray/test_pretrain.py."""

import shutil
import socket

import pytest

from mixmae.tracking import NOTE_TAG, TrackingError, create_run, finish_run, flatten, log_file, resolve_uri
from mixmae.tracking.store import link_in_note


def test_flatten_joins_names_and_keeps_numbers():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a.b": 1, "a.c.d": "none", "e": [1, 2]}


@pytest.mark.timeout(120)
def test_a_server_that_is_away_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TrackingError, match=f"127.0.0.1:{port} cannot be used"):
        create_run(uri=f"http://127.0.0.1:{port}", experiment="e", name="n", params={}, tags={})


@pytest.mark.timeout(120)
def test_run_in_sqlite_has_params_dataset_tags_and_status(tmp_path, mlflow_db):
    from mlflow import MlflowClient

    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    uri = resolve_uri(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    run = create_run(
        uri=uri,
        experiment="e",
        name="n",
        params={"optim": {"base_lr": 0.5, "betas": [0.9, 0.95]}},
        tags={"stage": "pretrain"},
        dataset={"name": "shapes", "digest": "abc", "source": "/x"},
    )
    finish_run(run, status="FINISHED", tags={"checkpoint": "/c"})
    seen = MlflowClient(tracking_uri=uri).get_run(run.run_id)
    assert seen.data.params == {"optim.base_lr": "0.5", "optim.betas": "[0.9, 0.95]"}
    assert seen.info.status == "FINISHED"
    assert seen.data.tags["checkpoint"] == "/c"
    assert seen.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert (tmp_path / "mlartifacts" / run.run_id / "artifacts" / "config.json").is_file()

    (tmp_path / "curve.png").write_bytes(b"png")
    for title in ("the curve", "the curve", None):  # drawn again and again, linked once
        log_file(run, tmp_path / "curve.png", title=title)
    link_in_note(run, "panel.png", "newest panel")
    note = MlflowClient(tracking_uri=uri).get_run(run.run_id).data.tags[NOTE_TAG]
    assert note.split("\n\n") == [
        f"[the curve]({run.file_link('curve.png')})",
        f"[newest panel]({run.file_link('panel.png')})",
    ]
