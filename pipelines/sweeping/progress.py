"""What a sweep prints while it runs."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path
from typing import Any

from ray import tune
from rich.live import Live
from rich.table import Table

from mixmae.jobs.record import read_record
from mixmae.training.run_folder import RunFolder
from pipelines.sweeping.results import label, texts_of
from pipelines.sweeping.trial import last_line, trial_folder


class Progress(tune.Callback):
    """Shows what happens to the trials: a table that changes in place on a terminal, otherwise one line per event.

    Tune pickles it with a sweep's state: fields, class and module are part of a file format (tuner.FORMER_MODULES).
    """

    def __init__(self, total: int, folder: Path, metric: str) -> None:
        self._total, self._folder, self._metric = total, folder, metric
        self._said: dict[str, str] = {}
        self._live: Live | None = None  # made at the first event: it cannot be pickled

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trials, trial, "starts")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._metric in result and "epoch" in result:
            self._say(trials, trial, f"epoch {result['epoch']:.2f} · {self._metric} {result[self._metric]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = read_record(RunFolder(trial_folder(self._folder, trial.trial_id)))
        ended = {"finished": "finished", "stopped": f"stopped: {record.reason if record else ''}"}
        how = ended.get(record.status if record else "", "halted")
        count = sum(other.is_finished() or other is trial for other in trials)
        self._say(trials, trial, f"{how} ({count} of {self._total} trials ended)")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        what = "is tried again, from its last checkpoint (its worker or its own process died)"
        self._say(trials, trial, what)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trials, trial, f"failed: {last_line(trial.get_error())}")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def _say(self, trials: list[Any], trial: Any, what: str) -> None:
        self._said[trial.trial_id] = what
        if not sys.stdout.isatty():
            print(f"trial {trial.trial_id} ({label(trial.config['values'])}) {what}", flush=True)
            return
        if self._live is None:
            self._live = Live(auto_refresh=False)
            self._live.start()
            atexit.register(self._live.stop)  # after Ctrl-C: the terminal wants its cursor back
        names = next((list(values) for other in trials if (values := other.config["values"])), [""])
        table = Table(*(name.rpartition(".")[2] for name in names), "")
        for other in trials:
            values = other.config["values"]
            texts = [label(None), *[""] * (len(names) - 1)] if values is None else texts_of(values)
            table.add_row(*texts, self._said.get(other.trial_id, other.status.lower()))
        self._live.update(table, refresh=True)
