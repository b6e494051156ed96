"""MLflow: runs, curves, pages and the registry. Nothing else imports mlflow, and importing this does not load it."""

from mixmae.tracking.pages import save_view
from mixmae.tracking.registry import claim_model_name, model_link, register_model
from mixmae.tracking.runs import (
    create_run,
    finish_run,
    flatten,
    log_file,
    log_table,
    metric_history,
    reopen_run,
    tag_run,
)
from mixmae.tracking.store import NOTE_TAG, RunRef, TrackingError, preload, resolve_uri
from mixmae.tracking.tracker import MlflowTracker

__all__ = [
    "NOTE_TAG",
    "MlflowTracker",
    "RunRef",
    "TrackingError",
    "claim_model_name",
    "create_run",
    "finish_run",
    "flatten",
    "log_file",
    "log_table",
    "metric_history",
    "model_link",
    "preload",
    "register_model",
    "reopen_run",
    "resolve_uri",
    "save_view",
    "tag_run",
]
