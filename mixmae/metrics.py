"""How good predictions are: pure functions on logits and labels.

Legend: N images, C classes. `logits` is (N, C) float, any scores whose softmax is the prediction (log-probabilities
are). `labels` is (N,) int64 in [0, C), or -1 where the class is not known: such images are left out, and every result
has the numbers of images that were counted and left out. Results are on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1
"""The label of an image whose class is not known."""


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank each image's class among its logits, 0 = highest; of equal logits the lower class comes first.

    It does not wait for a GPU, so a training step may use it: labels are not checked, and must all be known.
    Returns: (N,) int64; the class is among the top k where this is below k.
    """
    own = logits.gather(1, labels[:, None])  # (N, 1)
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the class is among the highest logits."""

    top: dict[int, float]
    """Share of the images with a known class whose class is among the k highest, by k; 1 for k >= C."""
    num_judged: int
    """Images with a known class."""
    num_unknown: int
    """Images with label -1, left out."""


def top_k_accuracy(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> Accuracy:
    """Measure the top-k accuracy for each k.

    Raises: ValueError if shapes disagree, a label is out of range, a logit is not a number, or no class is known.
    """
    known_logits, known = _known(logits, labels)
    ranks = label_ranks(known_logits, known)
    top = {k: (ranks < k).double().mean().item() for k in ks}
    return Accuracy(top=top, num_judged=len(known), num_unknown=len(labels) - len(known))


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """Accuracy of each class; the mean of `top1` over classes weighs all classes alike."""

    counts: Tensor
    """(C,) int64, images of the class."""
    top1: Tensor
    """(C,) float64, share of them that are right; NaN for a class without images."""
    top5: Tensor
    """(C,) float64, share of them whose class is among the five highest; NaN for a class without images."""
    num_unknown: int
    """Images with label -1, left out."""


def per_class_accuracy(logits: Tensor, labels: Tensor) -> ClassTable:
    """Measure the accuracy of each class.   Raises: as top_k_accuracy."""
    known_logits, known = _known(logits, labels)
    ranks = label_ranks(known_logits, known)
    num_classes = logits.shape[1]
    counts = torch.bincount(known, minlength=num_classes)
    top1, top5 = (torch.bincount(known[ranks < k], minlength=num_classes) / counts.double() for k in (1, 5))
    return ClassTable(counts=counts, top1=top1, top5=top5, num_unknown=len(labels) - len(known))


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the predictions of each class: (C, C) int64, entry (i, j) = images of class i whose highest logit is j.

    Its sum is the number of images with a known class.   Raises: as top_k_accuracy.
    """
    known_logits, known = _known(logits, labels)
    num_classes = logits.shape[1]
    cells = known * num_classes + known_logits.argmax(dim=1)
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Predictions sorted by confidence into bins of equal width: what a reliability diagram shows."""

    edges: Tensor
    """(num_bins + 1,) float64 from 0 to 1; bin b holds confidences in (edges[b], edges[b + 1]]."""
    counts: Tensor
    """(num_bins,) int64, images of the bin."""
    confidence: Tensor
    """(num_bins,) float64, their mean confidence; NaN for an empty bin."""
    accuracy: Tensor
    """(num_bins,) float64, share of them that are right; NaN for an empty bin."""
    expected_error: float
    """Expected calibration error: the sum over bins of counts / N * |accuracy - confidence|, 0 to 1."""
    num_unknown: int
    """Images with label -1, left out."""


def calibration(logits: Tensor, labels: Tensor, num_bins: int = 15) -> Calibration:
    """Compare the confidence of predictions with how often they are right.

    The confidence of a prediction is its largest softmax probability.
    Raises: as top_k_accuracy; ValueError if num_bins is below 1.
    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 2 and equation 3, with M = 15 bins.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}: give at least 1 (15 is usual)")
    known_logits, known = _known(logits, labels)
    confidence, predicted = known_logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    # Rounding may lift a confidence above 1: with the inner edges alone it still falls into the last bin.
    index = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(index, minlength=num_bins)
    right = torch.bincount(index, weights=(predicted == known).double(), minlength=num_bins)
    confident = torch.bincount(index, weights=confidence, minlength=num_bins)
    return Calibration(
        edges=edges,
        counts=counts,
        confidence=confident / counts,
        accuracy=right / counts,
        expected_error=((right - confident).abs().sum() / len(known)).item(),
        num_unknown=len(labels) - len(known),
    )


def _known(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check both and keep the images whose class is known: (n, C) and (n,), on the CPU."""
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or labels.dtype != torch.int64:
        raise ValueError(
            f"metrics take logits (N, C) and int64 labels (N,), got {tuple(logits.shape)} and {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    logits, labels = logits.detach().cpu(), labels.cpu()
    if ((labels < UNKNOWN) | (labels >= logits.shape[1])).any():
        raise ValueError(
            f"labels go from {labels.min().item()} to {labels.max().item()}, but the model knows classes 0 to "
            f"{logits.shape[1] - 1}: evaluate it on the classes that it was trained for (-1 = not known)"
        )
    known = labels != UNKNOWN
    if not known.any():
        raise ValueError(f"none of {len(labels)} images has a class (all labels are -1): give a labelled set")
    if logits.isnan().any():
        raise ValueError("some logits are not numbers (NaN): the model has diverged, use an older checkpoint")
    return logits[known], labels[known]
