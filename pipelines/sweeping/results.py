"""The results of a sweep: its trials ranked, as a table, a note, a heat map and learning curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mixmae.tracking import RunRef

SHOWN = {
    **{"final/top1": "top-1", "final/top5": "top-5", "final/loss": "loss", "best/top1": "best top-1"},
    **{"final/miou": "mIoU", "best/miou": "best mIoU"},
    **{"final/heldout_loss": "held-out loss", "final/knn_top1": "kNN top-1", "final/linear_top1": "linear top-1"},
}
"""Metrics that the table on the terminal has, where there are any, and what it calls them."""
FROM_SCRATCH = "from scratch"
"""What the reference is called."""
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
    is_reference: bool = False
    """Whether it is the reference, which is shown beside the others and never chosen."""

    @property
    def is_ranked(self) -> bool:
        """Whether it can be the best."""
        return self.status == "finished" and not self.is_reference

    @property
    def label(self) -> str:
        """What it is called."""
        return label(None if self.is_reference else self.values)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the best trial is compared with."""

    words: str
    """"from scratch" or "untrained encoder"."""
    value: float
    """Of the metric that trials are ranked by."""


def label(values: Mapping[str, Any] | None) -> str:
    """The values of a trial in a few words: "layer_decay 0.7, drop_path 0.1".   Args: values: None: the reference's."""
    if values is None:
        return FROM_SCRATCH
    return ", ".join(f"{name.rpartition('.')[2]} {text}" for name, text in zip(values, texts_of(values), strict=True))


def rank(results: Sequence[TrialResult], metric: str, mode: Literal["max", "min"]) -> list[TrialResult]:
    """Finished trials first, the best one on top, then halted ones, then those without a result, then the reference."""
    order = {"finished": 0, "halted": 1}

    def merit(result: TrialResult) -> tuple[int, float, str]:
        value = result.metrics.get(metric, float("nan"))
        if result.is_reference:
            return 3, 0.0, result.trial
        if value != value or result.status not in order:
            return 2, 0.0, result.trial
        return order[result.status], -value if mode == "max" else value, result.trial

    return sorted(results, key=merit)


def rows_of(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """One row per trial, all with the same columns; "" where a trial has no value."""
    metrics = sorted({name for result in results for name in result.metrics})
    return [
        {
            "rank": _place(number, result),
            "trial": result.trial,
            "status": result.status,
            **result.values,
            **{name: result.metrics.get(name, "") for name in metrics},
            "run_id": result.run_id,
            "reason": result.reason,
        }
        for number, result in enumerate(results, start=1)
    ]


def _place(number: int, result: TrialResult) -> str:
    return "reference" if result.is_reference else str(number) if result.is_ranked else ""


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows that have the same columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def link_line(links: Mapping[str, str]) -> str:
    """Links by their text, as Markdown in one line."""
    return " · ".join(f"[{words}]({link})" for words, link in links.items())


def scores(results: Sequence[TrialResult], metric: str, reference: Reference | None) -> str:
    """The best trial beside the reference: "41.00%, from scratch 29.00%".

    Args: results: ranked, the first finished.
    """
    shown = _number(results[0].metrics[metric], "loss" not in metric)
    return shown + (f", {reference.words} {_number(reference.value, 'loss' not in metric)}" if reference else "")


def verdict(results: Sequence[TrialResult], metric: str, reference: Reference | None, num_images: int) -> str:
    """Say which differences may be noise, and whether the reference is better than every trial.

    Args: results: ranked, the first finished.  num_images: that each trial was judged on.
    Returns: some sentences.
    Source: the standard error of a share p of n images is sqrt(p (1 - p) / n), and of a difference of two of them
        sqrt(2) times as much. All trials are judged on the same images, which makes it smaller: this is an upper bound.
    """
    is_share = metric.endswith(("top1", "top5"))  # of images; an mIoU is none
    ranked = [result.metrics[metric] for result in results if result.is_ranked]
    sentences = []
    if reference and (ranked[0] >= reference.value if "loss" in metric else ranked[0] <= reference.value):
        sentences.append(f"No trial is better than the reference ({reference.words}).")
    if not is_share:
        return " ".join(sentences)
    share = (ranked[0] * num_images + 1) / (num_images + 2)  # of a few images, 0 % and 100 % are not certain either
    noise = 2 * math.sqrt(2 * share * (1 - share) / num_images)
    sentences.append(
        f"Differences below {100 * noise:.1f} points may be noise (2 standard errors of a difference on {num_images:,} "
        "images); another seed can change more."
    )
    near = sum(ranked[0] - value < noise for value in ranked)
    if near > 1:
        sentences.append(f"The trials of ranks 1 to {near} differ by less.")
    if reference and abs(ranked[0] - reference.value) < noise:
        sentences.append("The best trial differs from the reference by less.")
    return " ".join(sentences)


def write_note(
    results: Sequence[TrialResult],
    metric: str,
    parent: RunRef,
    links: Mapping[str, str],
    reference: Reference | None = None,
    remarks: str = "",
) -> str:
    """The sweep's description on MLflow's page, as Markdown: the best trial, links, the ten best, the reference.

    Args: results: ranked.  links: by their text.  remarks: the last paragraph.
    """
    pages = {result.trial: replace(parent, run_id=result.run_id).link for result in results if result.run_id}
    first = "**No trial finished.**"
    if results[0].is_ranked:
        best = scores(results, metric, reference)
        first = f"**Best: [{results[0].label}]({pages[results[0].trial]}), {metric} {best}**"
    names = [name.rpartition(".")[2] for name in results[0].values]
    keys = [metric, *({metric.replace("final/", "best/")} & results[0].metrics.keys())]
    head = ["", *names, *keys, "run"]
    table = [head, ["---"] * len(head)]
    for number, result in enumerate(results, start=1):
        if number > 10 and not result.is_reference:
            continue
        numbers = [_number(result.metrics.get(key), "loss" not in key) for key in keys]
        link = f"[{result.trial}]({pages[result.trial]})" if result.run_id else ""
        table.append([_place(number, result) or result.status, *texts_of(result.values), *numbers, link])
    # One paragraph of two lines: MLflow folds what is below them until a visitor opens it.
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"{first}  \n{link_line(links)}\n\n{rows}" + (f"\n\n{remarks}" if remarks else "")


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
        remark = "" if result.status == "finished" else f"{result.status}: {result.reason.partition('. ')[0]}"
        table.add_row(_place(number, result) or "-", *texts_of(result.values), *metrics, result.trial, remark)
    console = Console()
    # A log file has no width of its own: lines are not folded there.
    (console if console.is_terminal else Console(width=160)).print(table)


def _number(value: float | None, share: bool) -> str:
    return "" if value is None else f"{value:.2%}" if share else f"{value:.4f}"


def draw_heat_map(results: Sequence[TrialResult], metric: str, path: Path, reference: Reference | None = None) -> None:
    """Draw the metric over the two fields that vary, one cell per combination; cells without a result are crossed out.

    Args: results: ranked, of a grid over two fields.
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
    best = f"\nbest {scores(results, metric, reference)}" if results[0].is_ranked else ""
    axes.set_title(f"{metric}{best}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


def heat_map_table(results: Sequence[TrialResult], metric: str) -> tuple[list[Any], list[Any], list[list[float]]]:
    """The metric over the two fields that vary.

    Returns: the values of the first field, from low to high, those of the second, and one row of numbers per value of
        the first; NaN where no trial finished.
    """
    results = [result for result in results if not result.is_reference]
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
        best = number == 0 and result.is_ranked
        name = result.label + ("" if result.status == "finished" else f" ({result.status})")
        style: dict[str, Any] = {"linestyle": "--", "color": "black"} if result.is_reference else {}
        width, order = (2.5, 3) if best else (1.0, 2)
        axes.plot(steps, values, marker=".", linewidth=width, zorder=order, label=name, **style)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7 if len(results) < 20 else 4)
    figure.savefig(path, dpi=120)
