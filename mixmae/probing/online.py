"""Judge an encoder while it pretrains: how well its features separate the classes of a few labelled images.

Each image is classified by all others (leave-one-out), so a small set is enough.
Legend: N images, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixmae.metrics import UNKNOWN
from mixmae.probing.knn import KnnConfig, knn_leave_one_out
from mixmae.probing.ridge import ridge_leave_one_out

IMAGES_PER_CLASS = 20
"""Images per class, if there are as many: with fewer, most of the k = 20 neighbours are of other classes."""


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
