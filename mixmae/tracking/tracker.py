"""What rank 0 logs to while it trains: the journal in the run's folder."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixmae.machine import settle_environment
from mixmae.tracking.journal import Journal, Reader
from mixmae.writing import writing

SYSTEM = "system/"
"""What the names of MLflow's system metrics begin with."""


class JournalTracker:
    """Writes points and panels to the output folder, from where the driver's Sender takes them to MLflow."""

    def __init__(self, folder: Path, *, system_metrics: bool = True, panel: str = "reconstruction") -> None:
        """Args: folder: of the run.  system_metrics: also log the use of CPU, memory and GPU, in the background.
        panel: what MLflow calls the series of panels.
        """
        self._folder = folder
        self._panel = panel
        self._journal = Journal(folder)
        self._closed = threading.Event()
        self._system = threading.Thread(target=self._log_system, name="system metrics", daemon=True)
        if system_metrics:
            self._system.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add points of the curves at a step."""
        self._journal.add_points(metrics, step)

    def log_panel(self, image: Image.Image, step: int) -> None:
        """Keep a picture of held-out images as panels/step_N.png of the run's folder."""
        name = f"panels/step_{step:07d}.png"
        try:
            with writing(self._folder / name) as partial:
                image.save(partial)
        except OSError as error:  # a picture less: training goes on
            warnings.warn(f"{self._folder / name} cannot be written: {error}", stacklevel=2)
            return
        self._journal.add(step=step, image=name, key=self._panel)

    def sync(self) -> None:
        """See that a power cut cannot take what was logged; called before a checkpoint that continues after it."""
        self._journal.sync()

    def close(self) -> None:
        """Stop the system metrics. What is in the journal is sent by the driver, which also ends the run."""
        self._closed.set()
        if self._system.is_alive():
            self._system.join(timeout=5)
        self.sync()

    def _log_system(self) -> None:
        try:
            settle_environment()
            interval_s, monitors = _system_monitors()
            known = Reader(self._folder)
            known.read()
            steps = [step for name, step in known.last_steps.items() if name.startswith(SYSTEM)]
        except Exception as error:
            warnings.warn(f"the use of CPU, memory and GPU is not logged: {error}", stacklevel=1)
            return
        step = max(steps, default=-1) + 1
        while not self._closed.is_set():
            used: dict[str, float] = {}
            for monitor in monitors:
                with contextlib.suppress(Exception):  # such as a driver's hiccup: the next sample comes
                    monitor.collect_metrics()
                    used |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
            if used:
                self._journal.add_points({f"{SYSTEM}{name}": value for name, value in used.items()}, step)
                step += 1
            self._closed.wait(interval_s)


def _system_monitors() -> tuple[float, list[Any]]:
    """Seconds between samples, and MLflow's collectors of them for what this machine has."""
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
            break
        except Exception:  # there is no such GPU, or no library that asks it
            continue
    return MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10, monitors
