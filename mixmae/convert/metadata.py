"""What a file says about its weights: the architecture, the preprocessing, the source, the digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixmae.encoders.build import EncoderConfig, config_from_json, config_to_json
from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD

METADATA_KEY = "mixmae"
"""Where an encoder file and a hub folder's config.json keep their metadata."""

NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image is prepared for the encoder: resize, centre crop, scale to 0..1, normalise."""

    image_size: tuple[int, int]
    """(H, W) in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from pixels in 0..1; one value per channel."""
    std: tuple[float, ...] = IMAGENET_STD
    """The difference is divided by it; one value per channel."""
    interpolation: str = "bicubic"
    """Filter for resizing."""
    crop_pct: float | None = None
    """Side of the central crop over that of the resized image; None: not known."""


@dataclass(frozen=True, kw_only=True)
class EncoderMetadata:
    """All that is needed to use the weights of an encoder, or of a classifier on one."""

    encoder: EncoderConfig
    """The architecture."""
    preprocessing: Preprocessing
    """What the encoder expects of images."""
    num_classes: int | None = None
    """Classes of the head; None for an encoder alone."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from: the format and name of their file; for a run also its step, data and config."""
    data_licence: str = NOT_STATED
    """How the licence of the training data restricts the weights, as stated by the person who exported them."""
    digest: str = ""
    """digest_of the weights."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        values = {name: getattr(self, name) for name in ("num_classes", "data_licence", "digest")}
        parts = {"encoder": config_to_json(self.encoder), "preprocessing": asdict(self.preprocessing)}
        return {**parts, **values, "source": dict(self.source)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EncoderMetadata:
        """Read what to_json wrote.   Raises: ValueError if fields are missing or not known."""
        try:
            encoder = config_from_json(content["encoder"])
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in content["preprocessing"].items()
            }
            preprocessing = Preprocessing(**values)
            rest = {name: content[name] for name in ("num_classes", "data_licence", "digest", "source")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the metadata was written by another version of mixmae ({error!r})") from error
        return cls(encoder=encoder, preprocessing=preprocessing, **rest)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of weights.

    Args: state: tensors by name.
    Returns: hexadecimal; of names, dtypes, shapes and bytes, independent of the order of the tensors.
    """
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
