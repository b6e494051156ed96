"""Runs in MLflow: created and ended by the driver alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mixmae.machine import settle_environment
from mixmae.tracking.store import RunRef, StoreAway, TrackingError, connect, explain, is_gone, link_in_note

KEY_TAG = "journal"
"""The tag by which create_run finds a run again whose creation it was not told of."""
MAX_PARAM_CHARS = 6000
"""MLflow's limit for the value of a parameter."""


def create_run(
    *,
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    dataset: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
    tables: Mapping[str, Mapping[str, Sequence[Any]]] = MappingProxyType({}),
    origin: Mapping[str, str] | None = None,
    key: str | None = None,
    start_time: int | None = None,
) -> RunRef:
    """Start a run with its parameters, tags and data set; it stays RUNNING until `finish_run`.

    Args:
        params: a nested mapping; it is logged flat, keys joined by dots, numbers as numbers.
        dataset: name, digest and source of the training set.
        tables: columns of tables that the run's page shows, by their names.
        origin: `run_id` of a run that this one starts from, if the store has it, and the `mark` that it is tagged with.
        key: of this run alone; the same call with the same key finishes the run that an earlier one has begun.
        start_time: in ms since 1970; None: now.
    Raises: StoreAway if the store gives no answer, TrackingError if it gives another one than it should.
    """
    settle_environment()
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = connect(uri)
        experiment_id = _experiment_id(client, experiment, uri)
        run_tags = {"mlflow.source.type": "JOB", **tags}
        if commit := git_commit():
            run_tags.setdefault("mlflow.source.git.commit", commit)
        if parent_run_id is not None:
            run_tags["mlflow.parentRunId"] = parent_run_id
        if key is not None:
            run_tags[KEY_TAG] = key
        run_id = _run_of_key(client, experiment_id, key)
        if run_id is None:
            run = client.create_run(experiment_id, run_name=name, tags=run_tags, start_time=start_time)
            run_id = _run_of_key(client, experiment_id, key) or run.info.run_id
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
        kept = {artifact.path for artifact in client.list_artifacts(run_id)} if tables else set()
        for title, columns in tables.items():
            if f"{title}.json" not in kept:  # MLflow adds rows to a table that is there
                client.log_table(run_id, {column: list(values) for column, values in columns.items()}, f"{title}.json")
        if origin is not None:
            tag_run(uri, origin["run_id"], f"{origin['mark']}.{run_id}", name)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise explain(uri, error) from error
    return RunRef(uri=uri, experiment_id=experiment_id, run_id=run_id)


def finish_run(
    run: RunRef,
    *,
    status: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """End the run: status FINISHED, FAILED or KILLED.   Args: metrics: its result, one point each at step 0."""
    client = connect(run.uri)
    for key, number in (metrics or {}).items():
        client.log_metric(run.run_id, key, number)
    for key, value in (tags or {}).items():
        client.set_tag(run.run_id, key, value)
    client.set_terminated(run.run_id, status=status)


def reopen_run(run: RunRef) -> bool:
    """Set an interrupted run RUNNING again.

    Returns: False if the store has answered that it no longer has the run.
    Raises: StoreAway if it gives no answer, which is not the same.
    """
    try:
        connect(run.uri).update_run(run.run_id, status="RUNNING")
    except Exception as error:
        if is_gone(error):
            return False
        raise explain(run.uri, error) from error
    return True


def tag_run(uri: str, run_id: str, key: str, value: str) -> RunRef | None:
    """Tag a run that another program made.

    Returns: where it is, or None if the store does not have it.   Raises: StoreAway.
    """
    client = connect(uri)
    try:
        client.set_tag(run_id, key, value)
        return RunRef(uri=uri, experiment_id=client.get_run(run_id).info.experiment_id, run_id=run_id)
    except Exception as error:
        trouble = explain(uri, error)
        if isinstance(trouble, StoreAway):
            raise trouble from error
        return None


def log_file(run: RunRef, path: Path, *, title: str | None = None) -> None:
    """Keep a file among the run's artifacts.   Args: title: of a link to it in the run's description; None: no link."""
    connect(run.uri).log_artifact(run.run_id, str(path))
    if title is not None:
        link_in_note(run, path.name, title)


def log_table(run: RunRef, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Keep rows of the same columns as a table that MLflow's page shows."""
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    connect(run.uri).log_table(run.run_id, columns, f"{name}.json")


def metric_history(run: RunRef, key: str) -> list[tuple[int, float]]:
    """The points (step, value) of a curve, the last one of each step; empty if the store or the curve is missing."""
    from mlflow.exceptions import MlflowException

    if run.uri.startswith("sqlite:///") and not Path(run.uri.removeprefix("sqlite:///")).is_file():
        return []
    try:
        points = connect(run.uri).get_metric_history(run.run_id, key)
    except (MlflowException, OSError):
        return []
    latest = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
    return sorted(latest.items())


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
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, encoding="utf-8", check=True
    )
    return done.stdout.strip()


def _param_text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= MAX_PARAM_CHARS else text[: MAX_PARAM_CHARS - 3] + "..."


def _run_of_key(client: Any, experiment_id: str, key: str | None) -> str | None:
    """The run with this key, if there is one.

    Where several are, since a server that stood still has in the end done all that it was asked, the first one is kept.
    """
    if key is None:
        return None
    runs = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'")
    first, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)) or [None]
    for other in others:
        client.delete_run(other.info.run_id)
    return None if first is None else first.info.run_id


def drop_twins(run: RunRef, key: str) -> None:
    """Delete other runs with the key of this one: a server that stood still may make them minutes later."""
    client = connect(run.uri)
    for twin in client.search_runs([run.experiment_id], f"tags.{KEY_TAG} = '{key}'"):
        if twin.info.run_id != run.run_id:
            client.delete_run(twin.info.run_id)


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
