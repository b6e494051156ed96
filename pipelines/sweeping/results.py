"""The results of a sweep: its trials ranked, as a table, a note, a heat map and learning curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mixmae.tracking import RunRef

SHOWN = {
    **{"final/top1": "top-1", "final/top5": "top-5", "final/loss": "loss", "best/top1": "best top-1"},
    **{"final/heldout_loss": "held-out loss", "final/knn_top1": "kNN top-1", "final/linear_top1": "linear top-1"},
}
"""Metrics that the table on the terminal has, where there are any, and what it calls them."""
Status = Literal["finished", "stopped", "halted", "failed", "not run"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended."""

    trial: str
    """Its id, and its folder's name."""
    values: Mapping[str, Any]
    """Of the fields that vary, by dotted name."""
    status: Status
    """stopped: it could not go on, halted: the scheduler or the budget ended it; failed: its workers did."""
    reason: str = ""
    """Why it is not finished, in a sentence."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """final/* of the last evaluation and best/* of the best one, as far as there are any."""
    run_id: str = ""
    """The MLflow run."""


def label(values: Mapping[str, Any]) -> str:
    """The values of a trial in a few words: "layer_decay 0.7, drop_path 0.1"."""
    return ", ".join(f"{name.rpartition('.')[2]} {text}" for name, text in zip(values, texts_of(values), strict=True))


def rank(results: Sequence[TrialResult], metric: str, mode: Literal["max", "min"]) -> list[TrialResult]:
    """Finished trials first, the best one on top, then halted ones, then those without a result."""
    order = {"finished": 0, "halted": 1}

    def merit(result: TrialResult) -> tuple[int, float, str]:
        value = result.metrics.get(metric, float("nan"))
        if value != value or result.status not in order:
            return 2, 0.0, result.trial
        return order[result.status], -value if mode == "max" else value, result.trial

    return sorted(results, key=merit)


def rows_of(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """One row per trial, all with the same columns; "" where a trial has no value."""
    metrics = sorted({name for result in results for name in result.metrics})
    return [
        {
            "rank": number if result.status == "finished" else "",
            "trial": result.trial,
            "status": result.status,
            **result.values,
            **{name: result.metrics.get(name, "") for name in metrics},
            "run_id": result.run_id,
            "reason": result.reason,
        }
        for number, result in enumerate(results, start=1)
    ]


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows that have the same columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def link_line(links: Mapping[str, str]) -> str:
    """Links by their text, as Markdown in one line."""
    return " · ".join(f"[{words}]({link})" for words, link in links.items())


def write_note(results: Sequence[TrialResult], metric: str, parent: RunRef, links: Mapping[str, str]) -> str:
    """The sweep's description on MLflow's page, as Markdown: the best trial, the links, a table of the ten best.

    Args: results: ranked.  links: by their text.
    """
    pages = {result.trial: replace(parent, run_id=result.run_id).link for result in results if result.run_id}
    first = "**No trial finished.**"
    if results[0].status == "finished":
        best = _number(results[0].metrics[metric], "loss" not in metric)
        first = f"**Best: [{label(results[0].values)}]({pages[results[0].trial]}), {metric} {best}**"
    names = [name.rpartition(".")[2] for name in results[0].values]
    keys = [metric, *({metric.replace("final/", "best/")} & results[0].metrics.keys())]
    head = ["", *names, *keys, "run"]
    table = [head, ["---"] * len(head)]
    for number, result in enumerate(results[:10], start=1):
        finished = result.status == "finished"
        numbers = [_number(result.metrics.get(key), "loss" not in key) for key in keys]
        link = f"[{result.trial}]({pages[result.trial]})" if result.run_id else ""
        table.append([str(number) if finished else result.status, *texts_of(result.values), *numbers, link])
    # One paragraph of two lines: MLflow folds what is below them until a visitor opens it.
    return f"{first}  \n{link_line(links)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table)


def texts_of(values: Mapping[str, Any]) -> list[str]:
    """The values of a trial as people read them."""
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values()]


def print_table(results: Sequence[TrialResult]) -> None:
    """Print the ranked trials."""
    names = [name.rpartition(".")[2] for name in results[0].values]
    known = {name for result in results for name in result.metrics}
    keys = [key for key in SHOWN if key in known]
    table = Table("", *names, *(SHOWN[key] for key in keys), "trial", "")
    for number, result in enumerate(results, start=1):
        metrics = [_number(result.metrics.get(key), "loss" not in key) for key in keys]
        position = str(number) if result.status == "finished" else "-"
        remark = "" if result.status == "finished" else f"{result.status}: {result.reason.partition('. ')[0]}"
        table.add_row(position, *texts_of(result.values), *metrics, result.trial, remark)
    console = Console()
    # A log file has no width of its own: lines are not folded there.
    (console if console.is_terminal else Console(width=160)).print(table)


def _number(value: float | None, share: bool) -> str:
    return "" if value is None else f"{value:.2%}" if share else f"{value:.4f}"


def draw_heat_map(results: Sequence[TrialResult], metric: str, path: Path) -> None:
    """Draw the metric over the two fields that vary, one cell per combination; cells without a result are crossed out.

    Args: results: of a grid over two fields.
    """
    from matplotlib.figure import Figure

    down, across = list(results[0].values)
    rows, columns, table = heat_map_table(results, metric)
    figure = Figure(figsize=(2.6 + 1.1 * len(columns), 1.8 + 0.8 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel=across.rpartition(".")[2], ylabel=down.rpartition(".")[2])
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(value) for value in columns])
    axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    known = [value for row in table for value in row if value == value]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            text = _number(value, "loss" not in metric) if value == value else "×"
            axes.text(x, y, text, ha="center", va="center", color="white" if value < middle else "black")
    axes.set_title(metric, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


def heat_map_table(results: Sequence[TrialResult], metric: str) -> tuple[list[Any], list[Any], list[list[float]]]:
    """The metric over the two fields that vary.

    Returns: the values of the first field, from low to high, those of the second, and one row of numbers per value of
        the first; NaN where no trial finished.
    """
    down, across = list(results[0].values)
    rows, columns = (sorted({result.values[name] for result in results}, key=_order) for name in (down, across))
    table = [[float("nan")] * len(columns) for _ in rows]
    for result in results:
        if result.status == "finished":
            value = result.metrics.get(metric, float("nan"))
            table[rows.index(result.values[down])][columns.index(result.values[across])] = value
    return rows, columns, table


def _order(value: Any) -> tuple[int, Any]:
    """Numbers by their size, then words and None."""
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def draw_curves(
    results: Sequence[TrialResult], curves: Mapping[str, Sequence[tuple[int, float]]], metric: str, path: Path
) -> None:
    """Draw the metric of all trials over their steps, the best one thick.

    Args: results: ranked.  curves: the points (step, value) by trial.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=metric)
    for number, result in enumerate(results):
        steps, values = zip(*curves[result.trial], strict=True) if curves.get(result.trial) else ((), ())
        best = number == 0 and result.status == "finished"
        name = label(result.values) + ("" if result.status == "finished" else f" ({result.status})")
        axes.plot(steps, values, marker=".", linewidth=2.5 if best else 1.0, zorder=3 if best else 2, label=name)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7 if len(results) < 20 else 4)
    figure.savefig(path, dpi=120)
