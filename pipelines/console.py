"""What a run prints: a live progress bar on a terminal, plain lines in a log, one sentence for an error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from mixmae.training.mailbox import Message
    from mixmae.training.run_folder import RunFolder


def fail(sentence: object, *, code: int = 1) -> NoReturn:
    """Print one sentence on stderr and end the process."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def elapsed_since(start: float) -> str:
    """Seconds since a time.monotonic(), as text."""
    return f"{time.monotonic() - start:.0f} s"


class ProgressView:
    """Shows the progress records of a run; safe to call from another thread than the one that made it."""

    def __init__(self, total_steps: int, *, live: bool | None = None) -> None:
        """live: draw a bar; None draws one when stdout is a terminal."""
        self._total = total_steps
        self._live = sys.stdout.isatty() if live is None else live
        self._console = Console()
        self._first: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("{task.fields[status]}"),
            console=self._console, transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total_steps, status="starting workers")

    def __enter__(self) -> ProgressView:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._bar.stop()

    def receive(self, message: Message, folder: RunFolder) -> None:
        """Show a message of the workers, and keep what belongs in the run's folder."""
        kind, content = message
        if kind == "progress":
            self.record(content)
        elif kind == "evaluation":
            self.evaluation(content)
        elif kind == "broken":
            for entry in folder.add_broken(content)[:3]:
                self.line(f"could not be used: {entry['where']}: {entry['reason']} (see {folder.ledger.name})")
        elif kind == "left_out":
            from mixmae.data.blocks import BrokenRecord
            from mixmae.data.broken import name_broken  # it decodes: not every command needs that

            self.line(f"left out of the evaluation: {name_broken([BrokenRecord(**entry) for entry in content])}")
        elif kind == "failed":
            self.line(f"worker failed, {content}")
        elif kind == "restart":
            self.line(f"starting new workers, from the last checkpoint, after {content}")
        elif kind == "note":
            self.line(f"note: {content}")
        elif kind == "workers" and content["of"] != str(content["count"]):
            self.line(f"training with {content['count']} workers of {content['of']}")
        elif kind == "started" and content > 0:
            self.line(f"continuing from step {content}")

    def record(self, record: Mapping[str, float]) -> None:
        """Show a progress record of the loop, with its `step`."""
        step = int(record["step"])
        status = " · ".join(
            [
                f"epoch {record['epoch']:.2f}",
                f"loss {record['loss']:.4f}",
                f"lr {record['lr']:.2e}",
                f"{record['images_per_s']:.0f} images/s",
                f"waiting for data {record['data_wait_share']:.0%}",
                f"ETA {self._eta(step)}",
            ]
        )
        if self._live:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.line(f"step {step}/{self._total} · {status}")

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of an evaluation, with its `step`; references, which stay the same, at step 0 alone."""
        step = int(metrics["step"])
        shown = {name: value for name, value in metrics.items() if step == 0 or not name.startswith("reference/")}
        values = " · ".join(f"{name} {value:.4f}" for name, value in shown.items() if name != "step")
        self.line(f"evaluation after step {step}: {values}")

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._live:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            with contextlib.suppress(BrokenPipeError):  # nobody reads it any more: training goes on
                print(text, flush=True)

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return "?"
        first_step, first_time = self._first
        seconds = (now - first_time) / max(step - first_step, 1) * (self._total - step)
        return str(timedelta(seconds=round(seconds)))
