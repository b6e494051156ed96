"""From the journal to MLflow, whatever happens to it: a real server that stands still or dies, a locked sqlite file.

Each test looks at what MLflow has in the end: every point once, in order, in one run.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixmae.tracking import (
    Journal,
    JournalTracker,
    RunRef,
    StoreAway,
    TrackingError,
    backlog,
    create_run,
    end_later,
    refused,
    reopen_run,
    run_of,
    send_rest,
    sender,
    start_sending,
    tag_run,
    unsent,
)
from mixmae.tracking.journal import read_sent
from tests.mlflow_server import MlflowServer, free_port

pytestmark = pytest.mark.timeout(300)

SPEC = {
    "experiment": "e",
    "name": "the run",
    "params": {"a": {"b": 1}},
    "tags": {"stage": "pretrain"},
    "dataset": {"name": "moths", "digest": "abc", "source": "/x"},
    "tables": {"data": {"what": ["images"], "count": [3]}},
}
CURVES = ("train/loss", "train/lr")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, mlflow_db) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_db, folder / "mlflow.db")
    server = MlflowServer(f"sqlite:///{folder}/mlflow.db", folder)
    yield server
    server.kill()


@pytest.fixture
def server(shared_server) -> MlflowServer:
    """A server that runs, whatever the last test did to it."""
    shared_server.start()
    return shared_server


@pytest.fixture
def uri(tmp_path, mlflow_db) -> str:
    """A sqlite store."""
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def impatient(monkeypatch):
    """Seconds instead of tens of them, for tests that wait for them to pass."""
    for name, seconds in {"START_S": 4, "START_SQLITE_S": 1, "CLOSE_S": 3, "POLL_S": 0.1, "MAX_PAUSE_S": 1}.items():
        monkeypatch.setattr(sender, name, seconds)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def log(folder: Path, steps: range) -> None:
    """What rank 0 does."""
    with contextlib.closing(JournalTracker(folder, system_metrics=False)) as tracker:
        for step in steps:
            tracker.log_metrics({"train/loss": 1 / (1 + step), "train/lr": 0.1 * step}, step)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


def check(uri: str, folder: Path, num_steps: int, status: str = "FINISHED") -> Any:
    """One run, with all that is known of it, and each point once.   Returns: the run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    ref = run_of(folder)
    assert ref is not None
    found = client.get_run(ref.run_id)
    twins = client.search_runs([ref.experiment_id], f"tags.journal = '{found.data.tags['journal']}'")
    assert [twin.info.run_id for twin in twins] == [ref.run_id]
    for name, value in zip(CURVES, (lambda step: 1 / (1 + step), lambda step: 0.1 * step), strict=True):
        history = client.get_metric_history(ref.run_id, name)
        assert sorted((point.step, point.value) for point in history) == [(s, value(s)) for s in range(num_steps)]
        assert [p.step for p in sorted(history, key=lambda p: (p.timestamp, p.step))] == list(range(num_steps))
        assert found.data.metrics[name] == value(num_steps - 1)
    assert found.info.status == status
    assert found.info.run_name == "the run"
    assert found.data.params == {"a.b": "1"}
    assert found.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert {"config.json", "data.json"} <= {item.path for item in client.list_artifacts(ref.run_id)}
    assert backlog(folder) == 0
    assert not unsent(folder)
    return found


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.slow), "standing still"])
@pytest.mark.usefixtures("impatient")
def test_away_at_the_start_in_the_middle_and_at_the_end(server, folder, capsys, how):
    """Three starts of one run: each begins, goes on and ends without MLflow, but for a moment in the middle of two."""
    away = server.kill if how == "killed" else server.pause
    away()
    sending = start_sending(folder, server.address, SPEC, continues=False)
    assert sending.opened() is None
    assert "Training goes on" in capsys.readouterr().out
    log(folder, range(10))
    assert backlog(folder) == 20
    server.start()
    wait_for(lambda: backlog(folder) == 0)
    ref = sending.ref
    assert ref is not None
    away()
    log(folder, range(10, 20))
    end_later(folder, ref, status="FAILED")
    left = sending.close()
    assert left is not None
    assert "lacks 20 points and the end of the run" in left
    assert "the same command sends them" in left

    sending = start_sending(folder, server.address, SPEC, continues=True)  # from the checkpoint of step 15
    assert sending.opened() == ref
    assert "Training goes on" in capsys.readouterr().out
    log(folder, range(15, 25))
    server.start()
    wait_for(lambda: backlog(folder) == 0)
    away()
    log(folder, range(25, 30))
    end_later(folder, ref, status="FINISHED", tags={"checkpoint": "/c"}, metrics={"final/loss": 0.5}, step=30)
    assert sending.close() is not None
    assert send_rest([folder]) is not None

    server.start()
    wait_for(lambda: send_rest([folder]) is None)  # on a busy machine an answer may take longer than is waited
    found = check(server.address, folder, 30)
    assert found.info.run_id == ref.run_id
    assert (found.data.tags["checkpoint"], found.data.metrics["final/loss"]) == ("/c", 0.5)
    assert send_rest([folder]) is None


def test_dies_while_it_answers(server, folder):
    """Hundreds of batches while the server is killed and started again; some are done, and nobody was told."""
    sending = start_sending(folder, server.address, SPEC, continues=False)
    assert sending.opened() is not None
    writer = threading.Thread(target=log, args=(folder, range(3000)))
    writer.start()
    wait_for(lambda: read_sent(folder).offset > 20_000)
    server.kill()
    writer.join()
    server.start()
    end_later(folder, sending.ref, status="FINISHED")
    wait_for(lambda: not unsent(folder))
    assert sending.close() is None
    check(server.address, folder, 3000)


def test_what_was_sent_but_not_noted_is_sent_again_without_harm(uri, server, folder):
    """As if the process had been killed between the two, at any place."""
    for store in (uri, server.address):
        sending = start_sending(folder, store, SPEC, continues=False)
        log(folder, range(20))
        Image.new("RGB", (8, 8)).save(folder / "panel.png")
        Journal(folder).add(step=20, image="panel.png", key="reconstruction")
        end_later(folder, None, status="FINISHED")
        assert sending.close() is None
        before = read_sent(folder)
        for offset in (0, before.offset // 2):
            type(before)(uri=store, run=None if offset == 0 else before.run, offset=offset).write(folder)
            assert send_rest([folder]) is None
            assert read_sent(folder) == before
        check(store, folder, 20)
        from mlflow import MlflowClient

        images = MlflowClient(tracking_uri=store).list_artifacts(before.run.run_id, "images")
        assert len(images) == 2  # one and its small copy


@pytest.mark.usefixtures("impatient")
def test_a_locked_sqlite_file(uri, folder, capsys):
    """Another process holds the write lock at the start, in the middle and at the end."""

    @contextlib.contextmanager
    def locked() -> Iterator[None]:
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")

    with locked():
        sending = start_sending(folder, uri, SPEC, continues=False)
        assert sending.opened() is None
        assert "Training goes on" in capsys.readouterr().out
        log(folder, range(10))
        wait_for(lambda: sending.trouble is not None)  # after 20 s, which MLflow itself waits for the lock
        assert isinstance(sending.trouble, StoreAway)
    wait_for(lambda: backlog(folder) == 0)
    with locked():
        log(folder, range(10, 20))
        end_later(folder, sending.ref, status="KILLED")
        assert sending.close() is not None
        assert backlog(folder) == 20
        again = start_sending(folder, uri, SPEC, continues=True)
        assert again.opened() == sending.ref  # "no answer" is not "does not exist"
        log(folder, range(15, 25))
    end_later(folder, again.ref, status="FINISHED")
    wait_for(lambda: not unsent(folder))
    assert again.close() is None
    check(uri, folder, 25)


def test_a_run_that_was_deleted_is_made_again_with_all_its_points(uri, folder, capsys):
    from mlflow import MlflowClient

    sending = start_sending(folder, uri, SPEC, continues=False)
    ref = sending.opened()
    assert ref is not None
    log(folder, range(10))
    assert sending.close() is None
    MlflowClient(tracking_uri=uri).delete_run(ref.run_id)
    sending = start_sending(folder, uri, SPEC, continues=True)
    log(folder, range(10, 15))
    end_later(folder, ref, status="FINISHED")
    assert sending.close() is None
    assert f"the run {ref.run_id} is no longer in {uri}" in capsys.readouterr().out
    assert check(uri, folder, 15).info.run_id != ref.run_id


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_what_mlflow_refuses_is_set_aside_and_the_rest_goes_on(where, uri, server, folder, capsys):
    from mlflow import MlflowClient

    uri = uri if where == "sqlite" else server.address
    sending = start_sending(folder, uri, SPEC, continues=False)
    ref = sending.opened()
    assert ref is not None
    log(folder, range(5))
    Journal(folder).add_points({"train/loss": 1 / 6, "not=allowed": 3.0, "train/lr": 0.5}, 5)
    log(folder, range(6, 10))
    Journal(folder).add(step=9, image="panels/gone.png", key="reconstruction")
    Journal(folder).add(status="RUNNING", tags={"x" * 1000: "a key that is too long"})
    log(folder, range(10, 12))
    end_later(folder, ref, status="FINISHED")
    assert sending.close() is None
    check(uri, folder, 12)
    assert backlog(folder) == 0
    said = capsys.readouterr().out
    assert said.count("note: MLflow does not take not=allowed") == 1
    assert "MLflow has refused 3 entries of this run" in said
    assert "away" not in said
    bad, gone, tag = refused(folder)
    assert (bad["step"], bad["metrics"]) == (5, {"not=allowed": 3.0})
    assert "not=allowed" in bad["reason"]
    assert gone["image"] == "panels/gone.png"
    assert tag["status"] == "RUNNING"
    # To a new run all of it goes once more, and so do the refusals.
    MlflowClient(tracking_uri=uri).delete_run(ref.run_id)
    sending = start_sending(folder, uri, SPEC, continues=True)
    end_later(folder, ref, status="FINISHED")
    assert sending.close() is None
    assert check(uri, folder, 12).info.run_id != ref.run_id
    assert len(refused(folder)) == 3


def test_what_the_runs_store_has_not_got_is_not_sent(uri, folder):
    allowed = [10**9]
    sending = start_sending(folder, uri, SPEC, continues=False, limit=lambda: allowed[0])
    assert sending.opened()
    log(folder, range(5))
    wait_for(lambda: not backlog(folder))
    allowed[0] = (folder / "metrics.jsonl").stat().st_size + 3
    log(folder, range(5, 8))
    time.sleep(3)
    assert backlog(folder) == 6
    allowed[0] = 10**9
    end_later(folder, None, status="FINISHED")
    assert sending.close() is None
    check(uri, folder, 8)


def test_a_run_that_is_older_than_journals_goes_on(uri, folder):
    ref = create_run(uri=uri, key="0", **SPEC)
    sending = start_sending(folder, uri, SPEC, continues=True, known=ref)
    assert sending.opened() == ref
    log(folder, range(5))
    assert sending.close() is None
    end_later(folder, ref, status="FINISHED")
    assert send_rest([folder]) is None
    assert check(uri, folder, 5).info.run_id == ref.run_id


def test_another_store_gets_the_whole_run(uri, tmp_path, mlflow_db, folder):
    sending = start_sending(folder, uri, SPEC, continues=False)
    log(folder, range(5))
    assert sending.close() is None
    (tmp_path / "other").mkdir()
    shutil.copy(mlflow_db, tmp_path / "other" / "mlflow.db")
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    sending = start_sending(folder, other, SPEC, continues=True)
    log(folder, range(3, 8))
    end_later(folder, None, status="FINISHED")
    assert sending.close() is None
    check(other, folder, 8)


def test_a_wrong_address_is_refused_and_one_that_is_away_is_not(folder, uri):
    class NotMlflow(BaseHTTPRequestHandler):
        status = 404

        def do_GET(self) -> None:
            self.send_response(self.status)
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), NotMlflow)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{web.server_port}"
        for status, kind in ((404, TrackingError), (401, TrackingError), (200, TrackingError), (503, StoreAway)):
            NotMlflow.status = status
            with pytest.raises(TrackingError, match=f"{web.server_port} cannot be used") as refused:
                create_run(uri=address, **SPEC)
            assert type(refused.value) is kind, status
        NotMlflow.status = 403
        with pytest.raises(TrackingError, match="403"):
            start_sending(folder, address, SPEC, continues=False).opened()
        assert not backlog(folder)
    finally:
        web.shutdown()
        web.server_close()
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StoreAway):
        tag_run(nobody, "1", "a", "b")
    with pytest.raises(StoreAway):  # a sweep that is continued then: it must not open a second run
        reopen_run(RunRef(uri=nobody, experiment_id="1", run_id="1"))
    assert not reopen_run(RunRef(uri=uri, experiment_id="1", run_id="0" * 32))
    with pytest.raises(TrackingError, match=r"no-such-host.invalid:5000 cannot be used \(.*NameResolution") as refused:
        create_run(uri="http://no-such-host.invalid:5000", **SPEC)
    assert type(refused.value) is TrackingError
    assert tag_run(uri, "0" * 32, "a", "b") is None
