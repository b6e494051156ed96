"""Run a trained model on many images, in evaluation mode: pooled features of an encoder, logits of a classifier.

Legend: N images in all, B in a batch, C channels, H W pixels, D width. A batch is anything with `images`, (B, C, H, W)
uint8, and `labels`, (B,) int64 with -1 = not known; mixmae.data.blocks.eval_batches yields them from any source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mixmae.encoders.base import Encoder
from mixmae.pixels import normalise


class LabelledBatch(Protocol):
    """Images with their classes."""

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) uint8."""

    @property
    def labels(self) -> Tensor:
        """(B,) int64, -1 = not known."""


class NoImages(ValueError):
    """There is not one image to look at."""


def extract_features(
    encoder: Encoder, batches: Iterable[LabelledBatch], *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pool the encoder's tokens for every image: the mean after the final norm, as ImageClassifier takes it.

    Args:
        encoder: on the device where it runs; for bfloat16 call this inside torch.autocast.
        batches: read once, in order.
        mean, std: of the pixel normalisation, in units of 0..1, one value per channel; use those of pretraining.
    Returns: features (N, D) float32 and labels (N,) int64, on the CPU.
    Raises: NoImages if all batches are empty, or there is none.
    """
    return _collect(encoder, lambda images: encoder(images).mean(dim=1), batches, mean, std)


def predict_logits(
    classifier: nn.Module, batches: Iterable[LabelledBatch], *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Score every image: logits (N, num_classes) float32 and labels (N,) int64, on the CPU, ready for mixmae.metrics.

    Args: classifier: maps (B, C, H, W) to logits.  Others, and Raises: as extract_features.
    """
    return _collect(classifier, classifier, batches, mean, std)


def _collect(
    model: Encoder | nn.Module,
    compute: Callable[[Tensor], Tensor],
    batches: Iterable[LabelledBatch],
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    device = next(parameter.device for _, parameter in model.named_parameters())
    outputs, labels = [], []
    with torch.no_grad(), _evaluating(model):
        for batch in batches:
            if not len(batch.images):  # all of them are broken
                continue
            images = normalise(batch.images.to(device), mean=mean, std=std)
            outputs.append(compute(images).float().cpu())
            labels.append(batch.labels.cpu())
    if not outputs:
        raise NoImages("there are no images: the set is empty, or none of them could be decoded")
    return torch.cat(outputs), torch.cat(labels)


@contextlib.contextmanager
def _evaluating(model: Encoder | nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; after it each module has its former mode again, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
