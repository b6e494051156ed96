"""Two runs with one output: one trains, and the other says whose the folder is."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from tests.ray.conftest import TINY, command, environment, has_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_of_two_runs_started_at_the_same_moment_one_is_refused(tmp_path, photos):
    output = tmp_path / "run"
    data = ["--data", str(photos), "--loop.max-broken-fraction", "0.2", "--workers", "1"]
    both = [
        subprocess.Popen(
            command("demo", "--output", output, *data, *TINY, "--loop.steps", "10"),
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        while all(process.poll() is None for process in both):
            time.sleep(0.2)
        loser = next(process for process in both if process.poll() is not None)
        winner = next(process for process in both if process is not loser)
        printed, said = loser.communicate(timeout=30)
        assert loser.returncode == 1, printed + said
        assert f"{output} is in use by " in said
        assert f"(process {winner.pid})" in said
        assert "choose another --output, or stop that run first" in said
        assert "Traceback" not in said
        printed, said = winner.communicate(timeout=400)
        assert winner.returncode == 0, printed + said
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    lock = json.loads((output / "run.lock").read_text())
    assert lock["generation"] == 1
    assert lock["released"].startswith("20")


@pytest.mark.slow
def test_a_run_whose_folder_was_taken_over_ends_and_leaves_it_alone(tmp_path, photos):
    output = tmp_path / "run"
    data = ["--data", str(photos), "--loop.max-broken-fraction", "0.2", "--workers", "1"]
    with subprocess.Popen(
        command("demo", "--output", output, *data, *TINY, "--loop.steps", "100000"),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            while not has_checkpoint(output) and not (output / "progress.json").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.2)
            lock = json.loads((output / "run.lock").read_text()) | {"generation": 2, "token": "x" * 16, "host": "cloud"}
            other = output / "run.lock.2"
            other.write_text(json.dumps(lock, indent=1) + "\n")
            other.replace(output / "run.lock")
            printed, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1, printed + said
    assert f"{output} was taken over by {lock['user']} on cloud" in said
    assert "this one has ended and leaves the folder alone" in said
    assert "Traceback" not in said
    assert json.loads((output / "run.lock").read_text()) == lock
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    assert '"status"' not in (output / "metrics.jsonl").read_text()
