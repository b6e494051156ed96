"""doctor.py on this machine, and on machines that lack something."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines import checks
from pipelines.checks import Finding, answer_mark, check_node, check_output, fail, ok, warn
from pipelines.doctor import check_clocks, check_workers, merge, show
from tests.factories import jpeg

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def server() -> Iterator[str]:
    """Something that answers to GET /health, as MLflow does."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as healthy:
        thread = threading.Thread(target=healthy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{healthy.server_port}"
        healthy.shutdown()
        thread.join()


def test_the_machine_that_runs_the_tests_can_train(tmp_path, server):
    (tmp_path / "photos").mkdir()
    for number in range(20):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    flags = ["--output", tmp_path / "runs" / "new", "--data", tmp_path / "photos", "--mlflow-uri", server]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines" / "doctor.py", *flags, "--workers", "1", "--device", "cpu"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith(("ok ", "warn "))}
    assert {"Python", "versions", "cores", "memory", "TMPDIR", "HOME", "MLflow", "data", "output", "workers"} <= set(
        lines
    )
    assert "torch 2." in lines["versions"]
    assert f"{server} answers" in lines["MLflow"]
    assert "images, the first has " in lines["data"]
    assert str(tmp_path) in lines["output"]
    assert done.stdout.splitlines()[-1].endswith(", 0 failed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"], "it leaves nothing behind"


def test_versions_outside_the_ranges_are_named(monkeypatch):
    wanted = [Requirement("torch>=99"), Requirement("numpy>=2"), Requirement("no-such-library>=1")]
    monkeypatch.setattr(checks, "requirements", lambda: (">=3.99", wanted))
    found = checks.check_versions()
    assert found.verdict == "fail"
    assert "torch is 2." in found.found
    assert "no-such-library is missing" in found.found
    assert "numpy" not in found.found
    assert checks.check_python().verdict == "fail"


def test_the_ranges_are_those_of_pyproject():
    python, wanted = checks.requirements()
    assert python == ">=3.11"
    assert {"ray", "torch", "mlflow", "psutil", "packaging"} <= {item.name for item in wanted}


def test_gpus_that_were_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_gpus("gpu").verdict == "fail"
    assert checks.check_gpus("auto").verdict == checks.check_gpus("cpu").verdict == "ok"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "torch" in checks.check_gpus("auto").found
    assert checks.check_gpus("auto").verdict == "fail"
    assert checks.check_jpegtran().verdict == "warn"


def test_places_that_are_too_small_or_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20))
    assert "--shm-size" in checks.check_shared_memory().remedy
    assert checks.check_temporary().verdict == "warn"
    assert checks.check_output(tmp_path, lambda file, content: {}).verdict == "warn"
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert checks.check_home().verdict == "warn"
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 50}")
    assert "at most 36 bytes" in checks.check_temporary().found


def test_mlflow_that_does_not_answer(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"  # nobody listens
        assert "Connection refused" in checks.check_mlflow(uri).found
    assert checks.check_mlflow(f"sqlite:///{tmp_path}/not/yet/mlflow.db").verdict == "ok"
    assert checks.check_mlflow("sqlite:////proc/mlflow.db").verdict == ("ok" if os.access("/proc", os.W_OK) else "fail")


def test_data_that_cannot_be_read(tmp_path):
    assert checks.check_data(str(tmp_path / "missing")).verdict == "fail"
    (tmp_path / "0.jpg").write_bytes(b"no image")
    assert checks.check_data(str(tmp_path)).verdict == "fail"


def test_an_output_is_seen_by_all_nodes_or_the_one_that_does_not_is_named(tmp_path):
    other = tmp_path / "the other node's disk"
    other.mkdir()

    def on_its_own_disk(file: Path, content: str) -> dict[str, str]:
        return {"a": answer_mark(file, content, "a"), "b": answer_mark(other / file.name, content, "b")}

    def on_one_that_looks_alike(file: Path, content: str) -> dict[str, str]:
        (other / file.name).write_text(content)
        return {"a": answer_mark(file, content, "a"), "b": answer_mark(other / file.name, content, "b")}

    def shared(file: Path, content: str) -> dict[str, str]:
        return {node: answer_mark(file, content, node) for node in "ab"}

    run = tmp_path / "runs" / "new"
    assert "written and read on 2 nodes" in check_output(run, shared).found
    assert "1 of 2 nodes (b: No such file" in check_output(run, on_its_own_disk).found
    assert "1 of 2 nodes (b: what it wrote is not there)" in check_output(run, on_one_that_looks_alike).found
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert check_output(Path("/proc/runs"), shared).verdict == "fail"


def test_a_check_that_breaks_is_a_finding_beside_the_others(monkeypatch):
    def check_memory() -> Finding:
        raise RuntimeError("no such file")

    monkeypatch.setattr(checks, "check_memory", check_memory)
    found = {finding.name: finding for finding in check_node("cpu", None, None)}
    assert found["memory"].found == "could not be looked at: RuntimeError: no such file"
    assert {"Python", "HOME", "ports"} <= set(found)


def test_nodes_that_are_alike_make_one_line():
    answers = {
        "a": [ok("cores", "8"), ok("versions", "torch 2.14"), ok("HOME", "/a")],
        "b": [ok("cores", "8"), ok("versions", "torch 2.15"), ok("HOME", "/b")],
        "c": [warn("cores", "2", "take more"), ok("versions", "torch 2.14"), ok("HOME", "/c")],
        "d": RuntimeError("its process died"),
    }
    assert list(merge(answers)) == [
        fail("node", "d could not be looked at (its process died)", "see Ray's logs there"),
        ok("cores", "2 nodes: 8"),
        warn("cores", "c: 2", "take more"),
        fail("versions", "nodes differ: torch 2.14; torch 2.15", "use one environment, or image, on all nodes"),
        ok("HOME", "3 nodes: /a and the like"),
    ]


def test_the_exit_status_is_that_of_what_failed(capsys):
    assert show([ok("a", "b"), warn("c", "d", "e")]) == 0
    assert show([ok("a", "b"), check_workers(3, 2)]) == 1
    assert "fail  workers   3 for 2 cores\n                -> lower --workers to 2 or less\n" in capsys.readouterr().out
    assert list(check_clocks({})) == []
