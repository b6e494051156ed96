"""Judge features without training: each image is classified by the votes of its nearest training images.

Legend: N query images, M training images, D width, C classes, k neighbours.
Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4; the
protocol of DINO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmae.metrics import UNKNOWN, Accuracy, top_k_accuracy

MAX_SIMILARITIES = 2**26
"""Most entries of the table of similarities that are in memory at once: 256 MB in float32 for any N and M."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """The kNN classifier; the defaults are DINO's."""

    k: int = 20
    """Training images that vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine / temperature): the smaller, the more the nearest count."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}: at least one training image must vote")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0 (0.07 is usual)")


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """Result of a kNN classification."""

    probabilities: Tensor
    """(N, C) float32 on the CPU: each class's share of the votes' weight; rows sum to 1."""
    accuracy: Accuracy
    """Top-1 and top-5 over the queries with a known class. At most k classes have votes; the others tie at 0."""


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    config: KnnConfig,
) -> KnnResult:
    """Classify images by the votes of the k training images with the most similar features (cosine).

    Args:
        train_features: (M, D) float. Everything is computed on their device.
        train_labels: (M,) int64 in [0, C); -1 does not vote.
        features: (N, D) float.  labels: (N,) int64 in [0, C); -1 is not judged.
    Raises: ValueError if shapes disagree, labels are out of range, features are not finite, fewer than k images can
        vote, or a class of the queries has no training image.
    """
    _check(train_features, train_labels, num_classes)
    _check(features, labels, num_classes)
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"training features have {train_features.shape[1]} values and the others {features.shape[1]}: extract both "
            "with the same encoder"
        )
    known = train_labels != UNKNOWN
    train_features, train_labels = train_features[known], train_labels[known]
    _check_k(config.k, len(train_labels))
    counts = torch.bincount(train_labels.cpu(), minlength=num_classes)
    asked = torch.bincount(labels[labels != UNKNOWN].cpu(), minlength=num_classes)
    lost = ((counts == 0) & (asked > 0)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{len(lost)} classes have no training image, for example class {lost[0]}, so their {asked[lost].sum()} "
            "images could never be right: add training images of these classes, or leave the classes out"
        )
    probabilities = _vote(train_features, train_labels, features, num_classes, config, leave_one_out=False)
    return _judge(probabilities, labels)


def knn_leave_one_out(features: Tensor, labels: Tensor, *, num_classes: int, config: KnnConfig) -> KnnResult:
    """Classify each image of a set by the others: for sets that are too small to hold some images out.

    Args: features: (N, D) float.  labels: (N,) int64 in [0, C); -1 neither votes nor is judged.
    Returns: probabilities of the images with a known class, in order, one row each; and their accuracy.
    Raises: ValueError as knn_classify. The only image of a class is judged, and cannot be right.
    """
    _check(features, labels, num_classes)
    known = labels != UNKNOWN
    features, voters = features[known], labels[known]
    _check_k(config.k, len(voters) - 1)
    return _judge(_vote(features, voters, features, num_classes, config, leave_one_out=True), voters)


def _vote(
    train: Tensor, classes: Tensor, queries: Tensor, num_classes: int, config: KnnConfig, *, leave_one_out: bool
) -> Tensor:
    """The (N, C) shares of the votes. leave_one_out: query i is training image i, which does not vote for itself."""
    train = F.normalize(train.float())  # (M, D)
    classes = classes.to(train.device)
    parts = []
    rows = max(1, MAX_SIMILARITIES // len(train))
    for start in range(0, len(queries), rows):
        part = F.normalize(queries[start : start + rows].to(train.device).float())  # (n, D)
        similarities = part @ train.T  # (n, M)
        if leave_one_out:
            similarities.diagonal(start).fill_(float("-inf"))
        nearest, index = similarities.topk(config.k, dim=1)  # (n, k)
        weights = (nearest / config.temperature).softmax(dim=1)
        votes = torch.zeros(len(part), num_classes, device=train.device)
        parts.append(votes.scatter_add_(1, classes[index], weights).cpu())
    return torch.cat(parts)


def _judge(probabilities: Tensor, labels: Tensor) -> KnnResult:
    # Ranks by votes are ranks by their logarithms, so the metrics take probabilities in place of logits.
    return KnnResult(probabilities=probabilities, accuracy=top_k_accuracy(probabilities, labels))


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not len(features):
        raise ValueError(
            f"features are (N, D) and labels (N,) of at least one image, got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if ((labels < UNKNOWN) | (labels >= num_classes)).any():
        raise ValueError(
            f"labels go from {labels.min().item()} to {labels.max().item()}, but there are {num_classes} classes: "
            "correct num_classes or the labels"
        )
    if not features.isfinite().all():
        raise ValueError("some features are not finite: the encoder has diverged, use an older checkpoint")


def _check_k(k: int, num_voters: int) -> None:
    if k > num_voters:
        raise ValueError(
            f"k is {k}, but only {num_voters} training images can vote: lower k or give more images with labels"
        )
