"""Judge an encoder while it pretrains: how well its features separate the classes of a few labelled images.

Each image is classified by all others (leave-one-out), so a small set is enough.
Legend: N images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixmae.metrics import UNKNOWN
from mixmae.probing.knn import KnnConfig, knn_leave_one_out
from mixmae.probing.ridge import ridge_leave_one_out

IMAGES_PER_CLASS = 20
"""Images per class, if there are as many: with fewer, most of the k = 20 neighbours are of other classes."""
KINDS = {"knn": "kNN", "linear": "linear probe"}
"""The classifiers, as metrics are called and as people call them."""


@dataclass(frozen=True, kw_only=True)
class OnlineProbeConfig:
    """The probe that a pretraining run on labelled images makes at each evaluation, by kNN and ridge regression."""

    images: int = 2000
    """Images of the probe, 20 per class from as many classes as that allows; 0: no probe."""
    k: int = 20
    """Neighbours that vote."""

    def __post_init__(self) -> None:
        if self.images < 0 or 0 < self.images < 2 * IMAGES_PER_CLASS:
            raise ValueError(
                f"probe images are {self.images}: give at least {2 * IMAGES_PER_CLASS} (two classes), or 0 for none."
            )
        if self.k < 1:
            raise ValueError(f"probe k is {self.k}: at least one image must vote (20 is usual).")


def choose_images(labels: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """Choose the images of a probe by their labels alone: the same in every run on the same set.

    Args: labels: (N,) of all rows, below 0 = not known.  num_images: most images to choose.
    Returns: rows in storage order, of each class up to an equal share; empty unless two classes have two images each:
        the only image of a class has no neighbour of its class.
    """
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = classes[counts >= 2]
    most = num_images // IMAGES_PER_CLASS
    if len(classes) > most:
        classes = classes[_spread(len(classes), most)]
    if len(classes) < 2:
        return np.empty(0, dtype=np.int64)
    share = num_images // len(classes)
    chosen = []
    for label in classes:
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[_spread(len(rows), share)] if len(rows) > share else rows)
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """`count` indices in [0, length), evenly spread."""
    return np.arange(count, dtype=np.int64) * length // count


def probe_features(features: Tensor, labels: Tensor, k: int) -> dict[str, float]:
    """Classify each image by all others, with kNN and with a ridge regression.

    Args: features: (N, D) float.  labels: (N,) int64, -1 = left out.
    Returns: probe/knn_top1 and probe/linear_top1, shares in 0..1.
    Raises: ValueError as knn_leave_one_out, for example for features that are not finite.
    """
    known = labels != UNKNOWN
    # These may be few of the set's classes: renumber them from 0.
    classes, indices = labels[known].unique(return_inverse=True)
    count = len(classes)
    knn = knn_leave_one_out(features[known], indices, num_classes=count, config=KnnConfig(k=k)).accuracy
    linear = ridge_leave_one_out(features[known], indices, num_classes=count)
    return {"probe/knn_top1": knn.top[1], "probe/linear_top1": linear.top[1]}


def summarise_probe(metrics: Mapping[str, float]) -> str:
    """Say in one line how good the features are, beside what they should surpass.

    Args: metrics: probe/* of probe_features, and reference/* of a run's first evaluation, if it is known.
    """
    knn, linear = (f"{name} {metrics[f'probe/{kind}_top1']:.1%}" for kind, name in KINDS.items())
    if "reference/chance" not in metrics:
        return f"{knn}, {linear}"
    share = {name.removeprefix("reference/"): f"{value:.1%}" for name, value in metrics.items()}
    return (
        f"{knn} (untrained encoder {share['knn_untrained']}, raw pixels {share['knn_pixels']}), "
        f"{linear} ({share['linear_untrained']}, {share['linear_pixels']}), chance level {share['chance']}"
    )


def draw_probe(evaluations: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw both probes over the steps, beside what they should surpass.

    Args:
        evaluations: at least one: probe/* of probe_features, reference/* if they are known, and the `step`.
        path: a PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    last = evaluations[-1]
    for axes, (kind, name) in zip(figure.subplots(1, 2, sharey=True), KINDS.items(), strict=True):
        steps, shares = zip(*((entry["step"], entry[f"probe/{kind}_top1"]) for entry in evaluations), strict=True)
        axes.plot(steps, shares, marker="o", label="pretrained")
        for key, label, style in (
            (f"{kind}_untrained", "untrained encoder", {"color": "C3", "linestyle": "--"}),
            (f"{kind}_pixels", "raw pixels", {"color": "C2", "linestyle": "-."}),
            ("chance", "chance", {"color": "grey", "linestyle": ":"}),
        ):
            if f"reference/{key}" in last:
                axes.axhline(last[f"reference/{key}"], label=label, **style)
        axes.set(title=f"{name}, top-1", xlabel="step")
        axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
