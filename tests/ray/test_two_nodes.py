"""The walk-through of docs/cluster/README.md: two raylets on this machine, doctor, a run, its status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.mlflow_server import free_port
from tests.ray.conftest import ROOT, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(590)]


def test_the_walk_through_of_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "cluster" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Two nodes on one machine, by hand")[1].split("\n## ")[0]
    (script,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")  # as in a checkout, with a runs/ of its own
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = free_port()
    with subprocess.Popen(
        ["bash", "-e", "-c", script],
        env=environment(PATH=path, PORT=str(port), PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            printed = shell.communicate(timeout=500)[0]
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)  # the shell's own process group
            raise
    logs = "".join((tmp_path / name).read_text() for name in ("head.log", "node.log"))
    assert shell.returncode == 0, printed + logs
    assert "ok    cluster   2 nodes, 4 CPUs, 0 GPUs" in printed
    assert "ok    versions  2 nodes: " in printed
    assert "written and read on 2 nodes" in printed
    assert ", 0 failed\n" in printed
    assert "2 CPU workers" in printed
    assert "state       finished\n" in printed
    assert "step        50 of 50 (100%)" in printed
    deadline = time.monotonic() + 30
    while left := [process for process in psutil.process_iter(["cmdline"]) if _is_ours(process, port)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def _is_ours(process: psutil.Process, port: int) -> bool:
    return any(f"two_nodes_{port}" in word for word in process.info["cmdline"] or [])
