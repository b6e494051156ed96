"""Runs in MLflow: the only file that imports mlflow.

The driver creates a run and ends it; rank 0 of the workers logs to it by its id, so a restarted worker continues the
same curves (FINISHED or FAILED is said once, by the driver).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_PARAM_CHARS = 6000
"""MLflow's limit for the value of a parameter."""
NOTE_TAG = "mlflow.note.content"
"""What MLflow's page shows as the run's description: Markdown, at most 8000 characters."""
TRAINING_SIDE = "workflowType=machine_learning"
"""Of a link: MLflow's page opens on its side for language models otherwise."""


class TrackingError(ValueError):
    """The tracking server cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """Where a run is: all that another process needs to log to it."""

    uri: str
    """Tracking URI, absolute."""
    experiment_id: str
    run_id: str

    @property
    def ui_command(self) -> str:
        """How a person opens the run."""
        if self.uri.startswith("sqlite:"):
            return f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        return f"open {shlex.quote(f'{self.uri}/{self.link}')}"

    @property
    def link(self) -> str:
        """Its page, for the descriptions that MLflow's pages show."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}?{TRAINING_SIDE}"

    def file_link(self, name: str) -> str:
        """The page that shows one of its artifacts, likewise."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}/artifacts/{name}?{TRAINING_SIDE}"


def resolve_uri(uri: str | None, folder: Path) -> str:
    """The tracking URI to use: the given one, else MLFLOW_TRACKING_URI, else a sqlite file in `folder` (absolute).

    Raises: TrackingError for a file store, which MLflow no longer writes, and for a relative sqlite path, which would
    mean another file in every worker.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise TrackingError(f"{uri} is a relative path: give sqlite://// and the absolute path of the file.")
    if "://" not in uri or uri.startswith("file:"):
        raise TrackingError(
            f"MLflow cannot write to {uri}: give http(s)://HOST:PORT of a server or sqlite:////ABSOLUTE/PATH.db."
        )
    return uri.rstrip("/")


def create_run(
    *,
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    dataset: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
) -> RunRef:
    """Start a run with its parameters, tags and data set; it stays RUNNING until `finish_run`.

    Args:
        params: a nested mapping; it is logged flat, keys joined by dots, numbers as numbers.
        dataset: name, digest and source of the training set.
    Raises: TrackingError if the store cannot be reached within about ten seconds.
    """
    # A server that is not there should be said at once, not after MLflow's default minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        experiment_id = _experiment_id(client, experiment, uri)
        run_tags = {"mlflow.source.type": "JOB", **tags}
        if commit := git_commit():
            run_tags["mlflow.source.git.commit"] = commit
        if parent_run_id is not None:
            run_tags["mlflow.parentRunId"] = parent_run_id
        run_id = client.create_run(experiment_id, run_name=name, tags=run_tags).info.run_id
        flat = flatten(params)
        client.log_batch(run_id, params=[Param(key, _param_text(value)) for key, value in flat.items()])
        if dataset is not None:
            entity = Dataset(
                name=dataset["name"],
                digest=dataset["digest"],
                source_type="local",
                source=json.dumps({"uri": dataset["source"]}),
            )
            client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])
        client.log_text(run_id, json.dumps(params, indent=2, default=str) + "\n", "config.json")
    except (MlflowException, OSError) as error:
        first_line = str(error).splitlines()[0][:300]
        raise TrackingError(
            f"The MLflow store {uri} cannot be used ({first_line}): start the server, correct --mlflow-uri, or leave "
            "it out to log to a local sqlite file."
        ) from error
    return RunRef(uri=uri, experiment_id=experiment_id, run_id=run_id)


def finish_run(
    run: RunRef,
    *,
    status: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """End the run: status FINISHED, FAILED or KILLED.   Args: metrics: its result, a point each at step 0."""
    client = _client(run.uri)
    for key, number in (metrics or {}).items():
        client.log_metric(run.run_id, key, number)
    for key, value in (tags or {}).items():
        client.set_tag(run.run_id, key, value)
    client.set_terminated(run.run_id, status=status)


def reopen_run(run: RunRef) -> bool:
    """Set an interrupted run RUNNING again.   Returns: False if the store no longer has it."""
    from mlflow.exceptions import MlflowException

    try:
        _client(run.uri).update_run(run.run_id, status="RUNNING")
    except MlflowException:
        return False
    return True


def tag_run(uri: str, run_id: str, key: str, value: str) -> RunRef | None:
    """Tag a run that another program made.   Returns: where it is, or None if the store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        _client(uri).set_tag(run_id, key, value)
        return RunRef(uri=uri, experiment_id=_client(uri).get_run(run_id).info.experiment_id, run_id=run_id)
    except MlflowException:
        return None


def save_view(
    parent: RunRef, name: str, *, params: Sequence[str], metrics: Sequence[str], descending: bool
) -> tuple[str, str]:
    """Save a view of the runs below another one: ranked by the first metric, in these columns and no others.

    Returns: links to it as a table and as parallel coordinates; it is also in the menu Views of the experiment.
    Source: MLflow keeps views in tags of the experiment, in a format of its own: this is 3.17's.
    """
    chart = {
        **{"type": "PARALLEL", "uuid": "parallel", "metricSectionId": "runs", "runsCountToCompare": 1000},
        **{"selectedParams": list(params), "selectedMetrics": [metrics[0]], "showAllRuns": True},
        **{"deleted": False, "isGenerated": False},
    }
    section = {"uuid": "runs", "name": name, "display": True, "isReordered": True, "deleted": False}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent.run_id}'",
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": not descending,
        "selectedColumns": [f"params.`{key}`" for key in params] + [f"metrics.`{key}`" for key in metrics],
        "runsHiddenMode": "SHOW_ALL",  # or charts leave out all but ten
        "compareRunCharts": [chart],
        "compareRunSections": [section | {"isGenerated": False}],
        "isAccordionReordered": True,  # or the sections are sorted by name
    }
    view = {"name": name, "createdAt": int(time.time() * 1000), "state": json.dumps(state)}
    _client(parent.uri).set_experiment_tag(
        parent.experiment_id, f"mlflow.sharedViewState.{parent.run_id}", json.dumps(view)
    )
    link = f"#/experiments/{parent.experiment_id}/runs?{TRAINING_SIDE}&viewStateShareKey={parent.run_id}"
    return link, f"{link}&compareRunsMode=CHART"


def log_file(run: RunRef, path: Path) -> None:
    """Keep a file among the run's artifacts."""
    _client(run.uri).log_artifact(run.run_id, str(path))


def log_table(run: RunRef, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Keep rows of the same columns as a table that MLflow's page shows."""
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    _client(run.uri).log_table(run.run_id, columns, f"{name}.json")


MODEL_TAG = ("mixmae", "classifier")
"""Marks the registered models that are ours."""


def claim_model_name(uri: str, name: str) -> None:
    """See that versions can be added to a registered model of this name, which is made if it is new.

    Raises: TrackingError if the name is something else's, or the store has no registry.
    """
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        known = {model.name: model for model in client.search_registered_models(f"name = '{name}'")}
        if name not in known:
            client.create_registered_model(name, tags=dict([MODEL_TAG]))
            return
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"The model {name!r} cannot be registered in {uri} ({str(error).splitlines()[0][:300]}): correct the name "
            "or the store."
        ) from error
    if MODEL_TAG not in known[name].tags.items():
        raise TrackingError(f"The registered model {name!r} in {uri} is not one of ours: choose another name.")


def register_model(run: RunRef, model: Any, example: Any, name: str, metadata: Mapping[str, Any]) -> str:
    """Add a version to a registered model, as a program of torch.export that needs none of our code.

    Args:
        run: the finished run that made it.
        model: a torch module.  example: an array of its inputs, 2 or more of them (torch.export fixes sizes of 1).
    Returns: the version; the alias "best" points at it.
    """
    import mlflow
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(run.uri)
    with torch.no_grad():
        output = model(torch.from_numpy(example)).numpy()
    inputs, outputs = (Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))]) for array in (example, output))
    with mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
        info = mlflow.pytorch.log_model(
            model,
            name="model",
            signature=ModelSignature(inputs, outputs),
            input_example=example,
            registered_model_name=name,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "mlflow"],
            metadata=dict(metadata),
        )
    version = str(info.registered_model_version)
    _client(run.uri).set_registered_model_alias(name, "best", version)
    return version


def model_link(name: str, version: str) -> str:
    """The page of a registered version, for the descriptions that MLflow's pages show."""
    return f"#/models/{name}/versions/{version}?{TRAINING_SIDE}"


def metric_history(run: RunRef, key: str) -> list[tuple[int, float]]:
    """The points (step, value) of a curve, the last one of each step; none if the store or the curve is not there."""
    from mlflow.exceptions import MlflowException

    if run.uri.startswith("sqlite:///") and not Path(run.uri.removeprefix("sqlite:///")).is_file():
        return []
    try:
        points = _client(run.uri).get_metric_history(run.run_id, key)
    except (MlflowException, OSError):
        return []
    latest = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
    return sorted(latest.items())


class NullTracker:
    """Logs nothing: what the workers other than rank 0 use, and tests."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Points of the curves at a step."""

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        """A picture of the series `key` at a step."""

    def set_tag(self, key: str, value: str) -> None:
        """A tag of the run."""

    def close(self) -> None:
        """Send what is waiting. The run itself is ended by the driver."""


class MlflowTracker(NullTracker):
    """Logs to a run that the driver made; metrics travel in the background. Losing the store never stops training."""

    def __init__(self, run: RunRef, *, system_metrics: bool = True) -> None:
        """Raises nothing when the store is away: it warns, and training goes on."""
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(run.uri)
        self._mlflow = mlflow
        self._run = run
        self._client = _client(run.uri)
        self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=True) if system_metrics else None
        if self._monitor is not None:
            self._monitor.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        with _warn_only("metrics"):
            self._mlflow.log_metrics(dict(metrics), step=step, run_id=self._run.run_id, synchronous=False)

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        with _warn_only("an image"):
            self._client.log_image(self._run.run_id, image, key=key, step=step)
            # MLflow's own card for a series opens on a list of parameters: the newest picture is a file and a link too.
            self._client.log_image(self._run.run_id, image, artifact_file=f"{key}.png")
            if NOTE_TAG not in self._client.get_run(self._run.run_id).data.tags:
                self.set_tag(NOTE_TAG, f"[newest {key}]({self._run.file_link(f'{key}.png')})")

    def set_tag(self, key: str, value: str) -> None:
        with _warn_only("a tag"):
            self._client.set_tag(self._run.run_id, key, value)

    def close(self) -> None:
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


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; None becomes "none" so that every run has the same keys."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else value
    return flat


def git_commit() -> str | None:
    """The commit of the checkout this file is in, with "-dirty" if files differ; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _param_text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= MAX_PARAM_CHARS else text[: MAX_PARAM_CHARS - 3] + "..."


def _client(uri: str) -> Any:
    import logging

    from mlflow import MlflowClient

    # The first use of a sqlite file prints a page of schema migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """The experiment's id, made if it is new; with sqlite its artifacts lie beside the database (absolute path)."""
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is not None:
        if existing.lifecycle_stage == "deleted":
            raise TrackingError(f"The MLflow experiment {name!r} was deleted: restore it or give another --experiment.")
        return existing.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was faster
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id
