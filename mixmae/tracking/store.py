"""Where runs are kept: a tracking server, or a sqlite file on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mixmae.machine import settle_environment

NOTE_TAG = "mlflow.note.content"
"""What MLflow's page shows as the run's description: Markdown, at most 8000 characters."""
TRAINING_SIDE = "workflowType=machine_learning"
"""Query of a link that makes MLflow 3 open its pages for model training, not those for language models."""


SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""A server that is away is noticed within seconds, not after the minutes of MLflow's usual retries."""


class TrackingError(ValueError):
    """The tracking server cannot be used; the message says why and what to do."""


class StoreAway(TrackingError):
    """The store gives no answer now: what was asked may be so or not."""


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """Where a run is: all that another process needs to log to it."""

    uri: str
    """Tracking URI, absolute."""
    experiment_id: str
    run_id: str

    @property
    def ui_command(self) -> str:
        """The shell command that opens the run in a browser."""
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

    Raises: TrackingError for a file store, which MLflow no longer writes, for a relative sqlite path, which would be
        another file in every worker, and for a folder whose path is another one as part of an address.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        path = str(folder.resolve())
        if "?" in path or unquote(path) != path:
            raise TrackingError(
                f"MLflow cannot keep its file in {path}, because a question mark, and % before two hex digits, mean "
                "something else in its addresses: choose another --output, or give --mlflow-uri."
            )
        return f"sqlite:///{path}/mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise TrackingError(f"{uri} is a relative path: give sqlite://// and the absolute path of the file.")
    if "://" not in uri or uri.startswith("file:"):
        raise TrackingError(
            f"MLflow cannot write to {uri}: give http(s)://HOST:PORT of a server or sqlite:////ABSOLUTE/PATH.db."
        )
    return uri.rstrip("/")


def preload(uri: str) -> None:
    """Import MLflow and make a local store ready, which takes seconds, before they are used.

    It can run in a thread while Ray starts. What fails here fails again, and is reported, when a run is created.
    """
    client = connect(uri)
    if uri.startswith("sqlite:///"):
        with contextlib.suppress(Exception):
            client.search_experiments(max_results=1)


def connect(uri: str) -> Any:
    """MLflow's client of a store; the folder of a sqlite file is made."""
    import logging

    settle_environment()
    from mlflow import MlflowClient

    # The first use of a sqlite file prints a page of schema migrations, a locked one a page of traceback, and a server
    # that is away a line per try.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    for variable, value in {**SHORT, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}.items():
        os.environ.setdefault(variable, value)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def explain(uri: str, error: Exception) -> TrackingError:
    """What an error of MLflow's client means: StoreAway if the same call may succeed later, else what to correct.

    Away are a server that refuses the connection, takes too long or answers 429 or 5xx, and a locked sqlite file. A
    name that nobody resolves, a certificate, any other 4xx, an answer that is not MLflow's, and a sqlite file that
    cannot be opened are the user's to correct.
    """
    from mlflow.exceptions import MlflowException

    text = str(error)
    first_line = (text.strip().splitlines() or [type(error).__name__])[0][:300]
    if uri.startswith("sqlite:"):
        away = "locked" in text
    elif any(sign in text for sign in ("NameResolutionError", "SSLError", "Invalid url", "valid JSON format")):
        away = False
    else:
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 500
        away = status >= 500 or status in (408, 429)
    return (StoreAway if away else TrackingError)(
        f"The MLflow store {uri} cannot be used ({first_line}): start the server, correct --mlflow-uri, or leave it "
        "out to log to a local sqlite file."
    )


def is_gone(error: Exception) -> bool:
    """Whether the store has answered that it does not have a run, or has it among the deleted ones."""
    code = getattr(error, "error_code", None)
    return code == "RESOURCE_DOES_NOT_EXIST" or (code == "INVALID_PARAMETER_VALUE" and "'active' state" in str(error))


def is_refusal(error: Exception) -> bool:
    """Whether the store has answered that it will never take what was sent, such as a name that it does not allow.

    Not so: a run that is gone, an address that is another program's, and who may not write there.
    """
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or is_gone(error):
        return False
    return error.get_http_status_code() in (400, 409, 413, 422)


def link_in_note(run: RunRef, name: str, title: str) -> None:
    """Add a link to one of the run's artifacts to its description, once."""
    client = connect(run.uri)
    note = client.get_run(run.run_id).data.tags.get(NOTE_TAG, "")
    link = f"[{title}]({run.file_link(name)})"
    if link not in note:
        client.set_tag(run.run_id, NOTE_TAG, f"{note}\n\n{link}".strip())
