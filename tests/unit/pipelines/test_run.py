"""What a run is begun with: its folder, its data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from mixmae.data.prepare import open_for_training
from mixmae.jobs.config import to_json
from mixmae.jobs.record import RunRecord, read_record
from mixmae.lock import release_all
from mixmae.tracking import Journal, RunRef, backlog, end_later, run_of, start_sending
from mixmae.tracking.journal import Sent
from mixmae.training import cluster
from mixmae.training.checkpoint import list_checkpoints, save_checkpoint, step_of
from mixmae.training.mirror import Mirror
from mixmae.training.run_folder import RunFolder
from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES
from pipelines.run import begin, with_workers
from tests.mlflow_server import free_port
from tests.s3_server import serve_s3


def test_a_folder_that_has_grown_is_packed_anew(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(photos / f"{index}.png")
    before, _ = open_for_training(str(photos), tmp_path / "data", 60)
    Image.new("RGB", (40, 40), (99, 0, 0)).save(photos / "new.png")
    after, _ = open_for_training(str(photos), tmp_path / "data", 60)
    assert after.num_rows == before.num_rows + 1
    assert after.digest != before.digest


def arguments(*, batch_size, micro_batch_size=None, workers=0):
    config = PRETRAIN_RECIPES["demo"]()
    config = replace(config, method=replace(config.method, num_images=2))
    loop = replace(config.loop, batch_size=batch_size, micro_batch_size=micro_batch_size)
    return Arguments(config=replace(config, loop=loop), workers=workers)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "cores", "workers"),
    [(16, None, 2, 2), (16, None, 3, 3), (16, None, 7, 4), (16, None, 64, 8), (6, None, 2, 2), (64, 16, 6, 6)],
)
def test_default_is_the_fewest_workers_with_the_shortest_steps(
    monkeypatch, batch_size, micro_batch_size, cores, workers
):
    monkeypatch.setattr(cluster, "default_workers", lambda *_: cores)
    given = arguments(batch_size=batch_size, micro_batch_size=micro_batch_size)
    assert with_workers(given).workers == workers


def test_workers_that_were_asked_for_stay_or_are_refused(monkeypatch):
    monkeypatch.setattr(cluster, "default_workers", lambda *_: 8)
    for count in (2, 3, "3"):
        assert with_workers(arguments(batch_size=16, workers=count)).workers == int(count)
    with pytest.raises(ValueError, match="cannot be shared by 9 workers: lower --workers to 8"):
        with_workers(arguments(batch_size=16, workers=9))


def test_a_range_of_workers_is_cut_to_what_machine_and_batch_can_have(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "default_workers", lambda *_: 4)
    monkeypatch.setattr(cluster, "is_own", lambda *_: True)
    assert with_workers(arguments(batch_size=16, workers="2:3")).workers == "2:3"
    assert capsys.readouterr().out == ""
    assert with_workers(arguments(batch_size=16, workers="2:6")).workers == "2:4"
    assert "--workers 2:6 is taken for 2:4: this machine has room for 4" in capsys.readouterr().out
    monkeypatch.setattr(cluster, "is_own", lambda *_: False)
    assert with_workers(arguments(batch_size=16, workers="2:60")).workers == "2:8"
    assert "--workers 2:60 is taken for 2:8: a batch has 8 parts" in capsys.readouterr().out
    given = arguments(batch_size=16, workers="2:4")
    given = replace(given, config=replace(given.config, encoder=replace(given.config.encoder, drop_path=0.1)))
    with_workers(given)
    assert "with --loop.micro-batch-size they do not" in capsys.readouterr().out
    with_workers(replace(given, config=replace(given.config, loop=replace(given.config.loop, micro_batch_size=4))))
    assert capsys.readouterr().out == ""


@pytest.mark.timeout(120)
def test_a_finished_run_started_again_gives_mlflow_what_it_lacks(tmp_path, mlflow_db, capsys, monkeypatch):
    """MLflow was away from the start to the end; then the user names another store."""
    monkeypatch.setattr("mixmae.tracking.sender.CLOSE_S", 5)
    folder, given = RunFolder(tmp_path / "run"), replace(arguments(batch_size=16), output=tmp_path / "run")
    folder.write(RunRecord(status="finished", recipe="demo", config=to_json(given.config), checkpoint="/c").to_json())
    spec = {"experiment": "e", "name": "run", "params": {}, "tags": {}}
    sending = start_sending(folder.path, f"http://127.0.0.1:{free_port()}", spec, continues=False)
    end_later(folder.path, None, status="FINISHED", metrics={"final/loss": 0.5}, step=9)
    assert "lacks 1 points" in (sending.close() or "")
    assert begin(given, "demo") is None
    assert "lacks 1 points and the end of the run: metrics.jsonl keeps them" in capsys.readouterr().out
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    other = replace(given, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for text in ("MLflow was behind; it has got 1 points", "This run is finished: /c"):
        assert begin(other, "demo") is None
        assert text in capsys.readouterr().out
    assert backlog(folder.path) == 0
    record = read_record(folder)
    assert record is not None
    assert record.mlflow is not None  # run.json was written before there was one
    assert (record.status, record.mlflow.uri) == ("finished", other.mlflow_uri)


class TestGoingBack:
    """--from-step N, as far as the folder is concerned."""

    @pytest.fixture
    def given(self, tmp_path):
        made = arguments(batch_size=16)
        folder = RunFolder(tmp_path / "run")
        ref = RunRef(uri="sqlite:///x.db", experiment_id="1", run_id="abc")
        record = RunRecord(status="stopped", recipe="demo", config=to_json(made.config), mlflow=ref, reason="diverged")
        folder.write(record.to_json())
        for step in (10, 20, 30):
            path = folder.path / "checkpoints" / f"step_{step:07d}"
            save_checkpoint(path, model=nn.Linear(2, 2), optimizer=None, state={"position": {"step": step}})
            folder.add_evaluation({"step": step, "probe/knn_top1": step / 100})
        (folder.path / "metrics.jsonl").write_text("{}\n")
        return replace(made, output=folder.path, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db")

    def steps(self, folder):
        return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]

    def test_what_came_after_is_put_aside_and_the_rate_may_change(self, given):
        optim = replace(given.config.optim, base_lr=1e-5)
        changed = replace(given, config=replace(given.config, optim=optim))
        with pytest.raises(ValueError, match=r"begun with other settings \(optim.base_lr was"):
            begin(changed, "demo")
        for _ in range(2):  # the same command again continues and does not go back once more
            run = begin(replace(changed, from_step=20), "demo")
            release_all()
            assert run.is_continued
            assert run.record.branch == {"step": 20, "run_id": "abc"}
            assert run.before.mlflow is None  # MLflow gets a run of its own
            assert self.steps(given.output) == [20, 10]
        aside = given.output / "left_0_at_step_20"
        assert self.steps(aside) == [30]
        assert (aside / "metrics.jsonl").exists()
        assert [json.loads(line)["step"] for line in (given.output / "evaluations.jsonl").open()] == [10, 20]
        assert not list(given.output.glob("left_1*"))
        run = begin(changed, "demo")  # and without the flag
        release_all()
        assert run.record.branch == {"step": 20, "run_id": "abc"}

    @pytest.mark.timeout(120)
    def test_mlflow_gets_what_it_lacks_of_what_was_put_aside(self, given, tmp_path, mlflow_db, capsys):
        from mlflow import MlflowClient

        spec = {"experiment": "e", "name": "run", "params": {}, "tags": {}}
        nobody = f"http://127.0.0.1:{free_port()}"
        sending = start_sending(given.output, nobody, spec, continues=False)
        Journal(given.output).add_points({"train/loss": 0.5}, 30)
        sending.leave()  # it was killed
        shutil.copy(mlflow_db, tmp_path / "mlflow.db")
        Sent(uri=given.mlflow_uri).write(given.output)  # and its store was away
        run = begin(replace(given, from_step=20), "demo")
        spec = {**spec, "name": "branch"}
        run.sender = start_sending(given.output, given.mlflow_uri, spec, continues=True)
        assert run.sender.opened()
        assert backlog(given.output / "left_0_at_step_20") == 1
        run.end("FINISHED")
        release_all()
        assert backlog(given.output / "left_0_at_step_20") == 0
        client = MlflowClient(tracking_uri=given.mlflow_uri)
        ref = run_of(given.output / "left_0_at_step_20")
        found = client.get_run(ref.run_id)
        assert (found.info.status, found.data.metrics) == ("KILLED", {"train/loss": 0.5})
        assert client.get_run(run_of(given.output).run_id).info.status == "FINISHED"
        assert "put aside" not in capsys.readouterr().out.replace("what came after it is in", "")

    def test_what_cannot_be(self, given, tmp_path):
        with pytest.raises(ValueError, match=r"no checkpoint of step 25 in .*: --from-step may be one of 10, 20, 30"):
            begin(replace(given, from_step=25), "demo")
        release_all()
        other = replace(given.config, augment=replace(given.config.augment, image_size=96))
        with pytest.raises(ValueError, match=r"other settings \(augment\.image_size"):
            begin(replace(given, from_step=20, config=other), "demo")
        with pytest.raises(ValueError, match="holds no run to go back in"):
            begin(replace(given, from_step=20, output=tmp_path / "new"), "demo")
        release_all()
        weights = given.output / "checkpoints" / "step_0000020" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(ValueError, match="is not what was written"):
            begin(replace(given, from_step=20), "demo")
        release_all()
        assert self.steps(given.output) == [30, 20, 10]


@pytest.mark.timeout(120)
def test_a_run_in_a_store_begins_goes_on_elsewhere_and_goes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mixmae.training.store_lock.SETTLE_S", 0.1)
    mlflow_uri = f"sqlite:///{tmp_path}/mlflow.db"
    with serve_s3() as server:
        first = replace(
            arguments(batch_size=16), output=Path(server.uri("r")), staging=tmp_path / "one", mlflow_uri=mlflow_uri
        )
        run = begin(first, "demo")
        assert not run.is_continued
        run.write(status="running")
        (run.folder.path / "metrics.jsonl").write_text('{"run": {}, "key": "k", "time": 0}\n')
        run.mirror.push()
        store = run.folder.store
        store.bring("worker")
        for step in (10, 20, 30):
            path = store.local / "checkpoints" / f"step_{step:07d}"
            save_checkpoint(path, model=nn.Linear(2, 2), optimizer=None, state={"position": {"step": step}})
            Mirror(store, "worker").push()
            run.folder.add_evaluation({"step": step, "x": 1.0})
        run.mirror.push()
        with pytest.raises(ValueError, match=r"s3://runs/r holds a run begun with other settings"):
            begin(
                replace(first, config=replace(first.config, augment=replace(first.config.augment, image_size=96))),
                "demo",
            )
        release_all()
        second = replace(first, staging=tmp_path / "two")
        with pytest.raises(ValueError, match=r"no checkpoint of step 25 in s3://runs/r: .* one of 10, 20, 30"):
            begin(replace(second, from_step=25), "demo")
        release_all()
        run = begin(second, "demo")
        assert run.is_continued
        assert (tmp_path / "two" / run.folder.path.name / "evaluations.jsonl").read_text().count("\n") == 3
        release_all()
        run = begin(replace(second, from_step=20), "demo")
        assert run.record.branch["step"] == 20
        run.mirror.push()
        release_all()
        assert "what came after it is in s3://runs/r/left_0_at_step_20" in capsys.readouterr().out
        assert [step_of(Path(name)) for name in store.checkpoints()] == [20, 10]
        assert server.read("r/left_0_at_step_20/metrics.jsonl").endswith(b'"status": "KILLED", "tags": {}}\n')
        assert b'"branch"' in server.read("r/run.json")
        assert server.read("r/evaluations.jsonl").count(b"\n") == 2
        assert "metrics.jsonl" not in server.names("r")
