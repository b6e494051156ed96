"""Judge features by a linear layer in closed form: ridge regression, each image classified by the fit to all others.

Legend: N images, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmae.metrics import Accuracy, top_k_accuracy

PENALTY = 0.1
"""On the squared weights, per image, for features of variance 1."""


def ridge_leave_one_out(features: Tensor, labels: Tensor, *, num_classes: int, penalty: float = PENALTY) -> Accuracy:
    """Classify each image by a linear layer fitted to the classes of all others by least squares.

    The fit is in closed form, and so is leaving each image out: with the hat matrix H of the fit to all, the scores
    that image i gets without itself are (H Y - h_ii y_i) / (1 - h_ii). Features are first normalised to mean 0
    and variance 1, as in MAE's linear probe.

    Args:
        features: (N, D) float. labels: (N,) int64 in [0, C).
        penalty: on the squared weights, times N; the bias is not penalised.
    Returns: top-1 accuracy.
    Source: the leave-one-out identity of ridge regression (Hastie et al., "The Elements of Statistical Learning",
        section 7.10).
    """
    wide = features.detach().cpu().double()  # (N, D)
    wide = (wide - wide.mean(dim=0)) / (wide.var(dim=0, unbiased=False) + 1e-6).sqrt()
    targets = F.one_hot(labels.cpu(), num_classes).double()  # (N, C)
    count, width = wide.shape
    shift = penalty * count
    if count < width:  # the same matrix from the smaller Gram matrix
        gram = wide @ wide.T  # (N, N)
        hat = torch.linalg.solve(gram + shift * torch.eye(count, dtype=gram.dtype), gram)
    else:
        gram = wide.T @ wide + shift * torch.eye(width, dtype=wide.dtype)  # (D, D)
        hat = wide @ torch.linalg.solve(gram, wide.T)  # (N, N)
    hat = hat + 1 / count
    own = hat.diagonal()[:, None]  # (N, 1)
    scores = (hat @ targets - own * targets) / (1 - own)
    return top_k_accuracy(scores, labels, ks=(1,))
