"""Classify images with a pretrained encoder."""

from __future__ import annotations

from torch import Tensor, nn

from mixmae.encoders.base import Encoder

HEAD_STD = 2e-5
"""Deviation of the head's initial weights (official code): nearly zero, so that the first steps spare the encoder."""


class ImageClassifier(nn.Module):
    """Average the encoder's final tokens and classify them with one linear layer.

    Args:
        encoder: built; without a group map it is the plain backbone.
        num_classes: at least 1.
    Source: the official finetuning model (average pooling after the final norm).
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.encoder = encoder
        self.head = nn.Linear(encoder.channels[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score (B, C, H, W) images: (B, num_classes) logits."""
        return self.head(self.encoder(images).mean(dim=1))
