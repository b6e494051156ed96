"""Judge a frozen encoder by a linear classifier on its pooled features.

fit.py trains a LinearHead on features that were extracted once (features.py). LinearProbe is the same head on an
encoder that runs on every batch, so that the training loop can train it with augmentation, as MAE does.

Legend: B images, C channels, H W pixels, D the encoder's last width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.encoders.base import Encoder

HEAD_STD = 0.01
"""Std of the head's initial weights (MAE)."""
NORM_EPS = 1e-6
"""Added to the variance of a feature (MAE)."""


class LinearHead(nn.Module):
    """Batch norm without parameters, then one linear layer: (B, D) features to (B, num_classes) logits.

    Source: MAE, appendix A (linear probing).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.norm = nn.BatchNorm1d(dim, eps=NORM_EPS, affine=False)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) == 1:  # one image has no variance: use the running statistics
            mean, variance = self.norm.running_mean, self.norm.running_var
            features = F.batch_norm(features, mean, variance, eps=self.norm.eps)
        else:
            features = self.norm(features)
        return self.linear(features)

    @torch.no_grad()
    def as_linear(self) -> nn.Linear:
        """Merge the norm's running statistics into one new linear layer, the kind of head that ImageClassifier has."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        folded = nn.Linear(self.linear.in_features, self.linear.out_features, device=mean.device)
        folded.weight.copy_(self.linear.weight * (variance + self.norm.eps).rsqrt())
        folded.bias.copy_(self.linear.bias - folded.weight @ mean)
        return folded


class LinearProbe(nn.Module):
    """A frozen encoder with a head that trains; an ImageClassifier trains both.

    Args:
        encoder: built; its parameters lose requires_grad, and it stays in evaluation mode also after train().
        head: takes (B, D) features.
    """

    def __init__(self, encoder: Encoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        for _, parameter in encoder.named_parameters():
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        for module in self.encoder.modules():
            module.training = False
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Score (B, C, H, W) normalised images: (B, num_classes) logits."""
        with torch.no_grad():
            features = self.encoder(images).mean(dim=1)  # (B, D)
        return self.head(features)


def fold_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a LinearProbe's weights into those of an ImageClassifier with the same outputs; others stay as they are.

    Args: state: names with head.norm.* and head.linear.* of a LinearHead; the encoder's may be among them.
    """
    if "head.linear.weight" not in state:
        return dict(state)
    num_classes, dim = state["head.linear.weight"].shape
    head = LinearHead(dim, num_classes)
    head.load_state_dict({name.removeprefix("head."): v for name, v in state.items() if name.startswith("head.")})
    rest = {name: value for name, value in state.items() if not name.startswith("head.")}
    return rest | {f"head.{name}": value.detach() for name, value in head.as_linear().state_dict().items()}
