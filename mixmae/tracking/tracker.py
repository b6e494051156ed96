"""What rank 0 logs to while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from PIL import Image

from mixmae.machine import settle_environment
from mixmae.tracking.store import RunRef, connect, link_in_note


class MlflowTracker:
    """Logs to a run that the driver made; metrics travel in the background. If the store is away it only warns."""

    def __init__(self, run: RunRef, *, system_metrics: bool = True) -> None:
        """Args: system_metrics: also log the use of CPU, memory and GPU, in the background."""
        settle_environment()
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(run.uri)
        self._mlflow = mlflow
        self._run = run
        self._client = connect(run.uri)
        self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=True) if system_metrics else None
        if self._monitor is not None:
            self._monitor.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add points of the curves at a step."""
        with _warn_only("metrics"):
            self._mlflow.log_metrics(dict(metrics), step=step, run_id=self._run.run_id, synchronous=False)

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        """Add an image to the series `key` at a step."""
        with _warn_only("an image"):
            self._client.log_image(self._run.run_id, image, key=key, step=step)
            # MLflow's own card for a series opens on a list of parameters: the newest image is also a file with a link.
            self._client.log_image(self._run.run_id, image, artifact_file=f"{key}.png")
            link_in_note(self._run, f"{key}.png", f"newest {key}")

    def set_tag(self, key: str, value: str) -> None:
        """Tag the run."""
        with _warn_only("a tag"):
            self._client.set_tag(self._run.run_id, key, value)

    def close(self) -> None:
        """Send what is waiting. The run itself is ended by the driver."""
        with _warn_only("the last metrics"):
            if self._monitor is not None:
                self._monitor.finish()
            self._mlflow.flush_async_logging()


class _warn_only:
    """Turn any failure of the store into a warning: hours of training are worth more than a point of a curve."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            warnings.warn(f"MLflow did not take {self._what}: {error}", stacklevel=3)
            return True
        return False
