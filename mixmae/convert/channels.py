"""Weights for images of other channels than they were trained on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixmae.convert.architecture import FIRST_CONVS
from mixmae.convert.read import Weights
from mixmae.pixels import fit_normalisation


def channels_of(weights: Weights) -> int | None:
    """The channels of the images that weights are for; None if they have no layer that reads pixels."""
    name = next((name for name in FIRST_CONVS if name in weights.state), None)
    return None if name is None else weights.state[name].shape[1]


def with_channels(weights: Weights, channels: int) -> Weights:
    """Adapt weights to images of so many channels; what fits already stays as it is.

    Args: weights: in our names.  channels: of the images.
    Returns: weights whose first layer, config and normalisation are for these channels; a decoder's are not changed.
    """
    name = next((name for name in FIRST_CONVS if name in weights.state), None)
    if name is None or weights.state[name].shape[1] == channels:
        return weights
    metadata = weights.metadata
    if metadata is not None:
        mean, std = fit_normalisation(metadata.preprocessing.mean, metadata.preprocessing.std, channels)
        metadata = replace(
            metadata,
            encoder=replace(metadata.encoder, in_channels=channels),
            preprocessing=replace(metadata.preprocessing, mean=mean, std=std),
        )
    adapted = adapt_channels(weights.state[name], channels)
    return replace(weights, state={**weights.state, name: adapted}, metadata=metadata)


@torch.no_grad()
def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt the weight of a layer that reads pixels to other channels.

    Args: weight: (D, C, h, w).  channels: C'.
    Returns: (D, C', h, w). For one channel the sum over C: a grey image gives what it gave in all C. For others the
        channels are repeated in their order, and rescaled by C / C', so that outputs keep their size.
    Source: the rule that timm has for C = 3.
    """
    theirs = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // theirs), 1, 1)[:, :channels]
    return repeated * (theirs / channels)
