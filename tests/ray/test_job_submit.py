"""`ray job submit` on a real cluster of this machine, as docs/cluster/README.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_server import environment, free_port
from tests.ray.conftest import ROOT, TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(540)]

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node with a dashboard, ended by its process id; yields its jobs address and the clients' environment."""
    port, dashboard = free_port(), free_port()
    # Without a token file of our own, head and clients would share the user's.
    # A job runs with the head's PATH: the environment must be active where the head is started.
    env = environment(RAY_AUTH_MODE="disabled", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus", "4", "--port", str(port)),
            *("--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"),
            # The default is one for a machine: another cluster here may have it, and then no job is taken.
            *("--dashboard-agent-listen-port", str(free_port())),
            *("--include-dashboard", "true", "--disable-usage-stats", "--temp-dir", f"/tmp/mixmae_ray_{port}"),
        ],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{dashboard}"
    listing = [RAY, "job", "list", "--address", address]
    try:
        for _ in range(60):
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            if subprocess.run(listing, env=env, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(1)
        else:
            pytest.fail("the head did not come up: " + (tmp_path / "head.log").read_text())
        yield address, env
    finally:
        head.terminate()  # --block ends the node's other processes with this one
        head.wait(timeout=60)
        log.close()


def test_a_job_pretrains_and_an_impossible_one_fails_within_a_minute(cluster, tmp_path, photos):
    address, env = cluster
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    excluded = json.dumps({"excludes": [".venv", "runs", ".git", "tests/golden"]})
    submit[-1:-1] = ["--runtime-env-json", excluded]
    python = ["python", "pipelines/pretrain.py", "demo", "--data", str(photos), *TINY]

    output = tmp_path / "run"
    done = subprocess.run(
        [*submit, *python, "--output", str(output), "--loop.max-broken-fraction", "0.2"],
        env=env, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 60/60" in done.stdout
    assert json.loads((output / "run.json").read_text())["status"] == "finished"

    start = time.monotonic()
    refused = subprocess.run(
        [*submit, *python, "--output", str(tmp_path / "too_many"), "--workers", "8", "--loop.batch-size", "32"],
        env=env, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "8 workers need 9 CPUs" in refused.stdout
    assert time.monotonic() - start < 90  # 30 s of waiting for nodes, the rest is the job's start
