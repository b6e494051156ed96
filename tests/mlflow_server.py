"""A real MLflow server that a test may stop, kill and start again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Of a program that a test starts as a user does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    # The server starts seven more processes for jobs that nothing here asks for.
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | extra


class MlflowServer:
    """It has one address and one store all its life; its log and new artifacts go to `folder`."""

    def __init__(self, store: str, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._store, self._folder = store, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or let it go on if it stands still, and wait until it answers."""
        if self._process is None:
            with (self._folder / "server.log").open("a") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                        *("--workers", "1", "--backend-store-uri", self._store),
                        *("--artifacts-destination", f"{self._folder}/artifacts"),
                    ],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
        self._signal(signal.SIGCONT)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                time.sleep(0.5)
        raise AssertionError("the MLflow server did not come up: " + (self._folder / "server.log").read_text())

    def pause(self) -> None:
        """Let it stand still: it takes connections and never answers."""
        self._signal(signal.SIGSTOP)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it: it refuses connections."""
        if self._process is not None:
            self._signal(how)
            self._signal(signal.SIGCONT)  # one that stands still takes no notice of others
            self._process.wait(timeout=30)
            self._process = None

    def _signal(self, how: signal.Signals) -> None:
        # The server has children of its own: its process group, which is nobody else's.
        if self._process is not None:
            os.killpg(self._process.pid, how)


@contextlib.contextmanager
def serve_mlflow(store: str, folder: Path) -> Iterator[str]:
    """A server that runs all the while.   Yields: its address."""
    server = MlflowServer(store, folder)
    try:
        server.start()
        yield server.address
    finally:
        server.kill(signal.SIGTERM)
