"""MLflow: runs, curves, pages and the registry. Nothing else imports mlflow, and importing this does not load it.

What a run logs while it trains goes through a journal in its output folder: tracker.py writes it, journal.py has its
format, sender.py takes it to MLflow.
"""

from mixmae.tracking.journal import Journal, Reader, backlog, mark_ended, points, refused, run_of, unsent
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
from mixmae.tracking.sender import Sender, end_later, send_rest, start_sending
from mixmae.tracking.store import NOTE_TAG, RunRef, StoreAway, TrackingError, preload, resolve_uri
from mixmae.tracking.tracker import JournalTracker

__all__ = [
    "NOTE_TAG",
    "Journal",
    "JournalTracker",
    "Reader",
    "RunRef",
    "Sender",
    "StoreAway",
    "TrackingError",
    "backlog",
    "claim_model_name",
    "create_run",
    "end_later",
    "finish_run",
    "flatten",
    "log_file",
    "log_table",
    "mark_ended",
    "metric_history",
    "model_link",
    "points",
    "preload",
    "refused",
    "register_model",
    "reopen_run",
    "resolve_uri",
    "run_of",
    "save_view",
    "send_rest",
    "start_sending",
    "tag_run",
    "unsent",
]
