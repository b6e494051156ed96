"""Training while the services around it fail: MLflow stands still and dies, the driver's mailbox dies."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter

import pytest
import ray

from mixmae.tracking import Reader, backlog, points
from mixmae.training.mailbox import deliver, open_mailbox, reading
from tests.mlflow_server import MlflowServer, environment
from tests.ray.conftest import TINY, command, has_checkpoint, interrupt, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_mlflow_stands_still_dies_and_comes_back(photos, tmp_path, mlflow_db):
    """A run is interrupted, continued, and finished while MLflow comes and goes: no point is lost, none is doubled."""
    from mlflow import MlflowClient

    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    server, output = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db", tmp_path), tmp_path / "run"
    steps = ["--loop.steps", "160", "--loop.max-broken-fraction", "0.2"]
    arguments = ["--data", photos, "--mlflow-uri", server.address, "--workers", "1", *TINY, *steps]
    program = command("demo", "--output", output, *arguments)

    def last_step() -> int:
        return max((step for step, _ in points(output, "train/loss")), default=0)

    try:
        # Away at the start. Interrupted after points that come after the checkpoint, so that they are logged again.
        status, text = interrupt(
            program,
            lambda: has_checkpoint(output) and last_step() % 40 in (15, 20, 25, 30, 35),
            cwd=tmp_path,
        )
        assert status == 130, text
        assert "Training goes on" in text
        assert "the same command sends them" in text
        server.start()
        before = last_step()
        with subprocess.Popen(
            program, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            while last_step() < before + 10:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            server.pause()
            text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        assert "Finished in" in text
        assert "the same command sends them" in text
        assert backlog(output) > 0
        server.kill()
        again = run("demo", "--output", output, *arguments, cwd=tmp_path)
        assert again.returncode == 0
        assert "the same command sends them" in again.stdout
        server.start()
        again = run("demo", "--output", output, *arguments, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "MLflow was behind; it has got" in again.stdout

        client = MlflowClient(tracking_uri=server.address)
        (experiment,) = client.search_experiments(filter_string="name = 'mixmae-pretrain'")
        (found,) = client.search_runs([experiment.experiment_id])
        record = json.loads((output / "run.json").read_text())
        assert (record["status"], record["mlflow"]["run_id"]) == ("finished", found.info.run_id)
        assert found.info.status == "FINISHED"
        assert found.data.tags["checkpoint"] == record["checkpoint"]
        assert found.data.metrics["final/loss"] == record["metrics"]["final/loss"]
        expected: Counter[tuple[str, int]] = Counter()
        for entry, _ in Reader(output).read():
            expected.update((name, entry["step"]) for name in entry.get("metrics", {}))
        assert set(expected.values()) == {1}
        assert {("train/loss", step) for step in (1, *range(5, 161, 5))} <= expected.keys()
        names = {name for name, _ in expected}
        seen = Counter(
            (name, point.step) for name in names for point in client.get_metric_history(found.info.run_id, name)
        )
        assert seen == expected
        panels = {path.stem for path in (output / "panels").iterdir()}
        images = [item.path for item in client.list_artifacts(found.info.run_id, "images") if item.path.endswith("png")]
        assert len(images) == len(panels) >= 4
    finally:
        server.kill()


@pytest.fixture
def cluster():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_messages_are_best_effort(cluster, capsys):
    """The mailbox dies, and the driver's disk is full: who writes goes on, and who reads does too."""
    seen: list[str] = []

    def receive(message):
        if message[0] == "broken":
            raise OSError("no space left on device")
        seen.append(message[1])

    mailbox = open_mailbox()
    with reading(mailbox, receive, interval_s=0.1):
        deliver(mailbox, ("note", "before"))
        deliver(mailbox, ("broken", []))
        deliver(mailbox, ("broken", []))
        deliver(mailbox, ("note", "after"))
        while seen != ["before", "after"]:
            time.sleep(0.1)
        ray.kill(mailbox, no_restart=False)
        while seen[-1] != "restarted":
            deliver(mailbox, ("note", "restarted"))
            time.sleep(0.2)
        ray.kill(mailbox)  # and for good
        deliver(mailbox, ("note", "nobody"))
    assert capsys.readouterr().out.count("no space left on device") == 1
