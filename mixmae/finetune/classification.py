"""Classify images with a pretrained encoder: the model of finetuning, and what one of its steps computes.

Legend: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.encoders.base import Encoder
from mixmae.machine import to_device
from mixmae.metrics import UNKNOWN, label_ranks
from mixmae.pixels import normalise
from mixmae.step import StepOutput

HEAD_STD = 2e-5
"""Std of the head's initial weights (official code): nearly zero, so that the encoder's first gradients are small."""

Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(images (B, C, H, W), labels (B,), CPU generator) -> (mixed images, targets (B, num_classes) whose rows sum to 1):
mixmae.data.images.mixup.mix_batch with its config and number of classes filled in."""


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


class Predictor(nn.Module):
    """A classifier for images as they come from a file: uint8 pixels to the probability of each class.

    Args:
        model: a classifier.
        mean, std: of the pixel normalisation, in units of 0..1, one value per channel.
    """

    def __init__(self, model: ImageClassifier, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of the size that the model is for -> (B, num_classes), rows that sum to 1."""
        return self.model(normalise(images, mean=self.mean, std=self.std)).softmax(dim=1)


def classification_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    first_sample: int,
    *,
    mix: Mix | None = None,
    label_smoothing: float = 0.0,
) -> StepOutput:
    """Compute the cross entropy of a batch.

    Args:
        model: maps (B, C, H, W) to logits; an ImageClassifier, wrapped by DDP or not.
        images: (B, C, H, W) float, normalised. labels: (B,) int64, -1 = not known: such images are left out. Pass
            labels on the CPU: filtering them there avoids a GPU sync.
        generator: of the step, on the CPU. first_sample: index of the batch's first image in the global batch; every
            micro-batch of a step is mixed in its own way, the same on any worker.
        mix: mixes images and makes their targets, smoothed or not; None mixes nothing.
        label_smoothing: share of the label that is spread over all classes if mix is None.
    Returns: the cross entropy with the targets; without `mix` also `top1` (a mixed image has no single class).
    Raises: ValueError if no image of the batch has a class.
    Source: paper, table 12.
    """
    images, labels = known_images(images, labels)
    if mix is None:
        logits = model(images)
        (labels,) = to_device((labels,), images.device)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        return StepOutput(loss=loss, metrics={"top1": (label_ranks(logits.detach(), labels) == 0).float().mean()})
    seed = int(torch.randint(2**62, (), generator=generator)) + first_sample
    images, targets = mix(images, labels, torch.Generator().manual_seed(seed))
    return StepOutput(loss=F.cross_entropy(model(images).float(), targets))


def known_images(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the images of a batch whose class is known; the same tensors if all are.

    Raises: ValueError if none is.
    """
    known = labels != UNKNOWN
    if known.all():
        return images, labels
    if not known.any():
        raise ValueError(f"none of the {len(labels)} images of a batch has a class: train on a labelled set")
    return images[to_device((known.nonzero()[:, 0],), images.device)[0]], labels[known]
