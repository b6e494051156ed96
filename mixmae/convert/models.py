"""Building models from weights, and taking weights out of models."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mixmae.convert.architecture import StateDict, describe
from mixmae.convert.metadata import EncoderMetadata
from mixmae.convert.read import Weights, read_weights
from mixmae.encoders.base import Encoder
from mixmae.encoders.build import EncoderConfig, build_encoder
from mixmae.finetune.classification import ImageClassifier


def load_encoder(
    path: Path | str,
    image_size: int | tuple[int, int] | None = None,
    encoder: EncoderConfig | None = None,
    key: str | None = None,
) -> tuple[Encoder, EncoderMetadata]:
    """Build the encoder of a file of weights, and fill it with them.

    Args: as in read_weights.
    Returns: the encoder, and its metadata; a head or a decoder is left out.
    Raises: ValueError if the architecture is not known or the weights are not its own, and as read_weights.
    """
    weights = read_weights(path, image_size, encoder, key)
    model, metadata = build_model(weights, path)
    return model.encoder if isinstance(model, ImageClassifier) else model, metadata  # type: ignore[return-value]


def build_model(weights: Weights, path: Path | str) -> tuple[nn.Module, EncoderMetadata]:
    """Build the model of weights, an encoder or with a head a classifier, and fill it with them.

    Args: weights: as read.  path: for messages.
    Returns: the model, in evaluation mode, and the metadata.
    Raises: ValueError if the architecture is not known or the weights are not its own.
    """
    metadata = weights.metadata
    if metadata is None:
        raise ValueError(f"{path} holds {describe(weights.state)}, which cannot be built: {weights.unknown}")
    encoder = build_encoder(metadata.encoder)
    model = encoder if metadata.num_classes is None else ImageClassifier(encoder, metadata.num_classes)
    assert isinstance(model, nn.Module)
    own = encoder_state(model)[1]
    theirs = {name: value for name, value in weights.state.items() if name.startswith("encoder.") or name in own}
    wrong = own.keys() ^ theirs.keys() or {name for name in own if own[name].shape != theirs[name].shape}
    if wrong:
        raise ValueError(
            f"{path} does not fill the {type(encoder).__name__} that it describes: {min(wrong)} is missing, has no "
            f"place, or has another shape ({len(wrong)} such)"
        )
    prefix = "encoder." if metadata.num_classes is None else ""
    model.load_state_dict({name.removeprefix(prefix): weights.state[name] for name in own})
    return model.eval(), metadata


def encoder_state(model: nn.Module) -> tuple[Encoder, StateDict]:
    """Return the encoder of a model, and the weights of the encoder and of the linear head, if any, in our names."""
    if not hasattr(model, "encoder"):
        return model, {f"encoder.{name}": value for name, value in model.state_dict().items()}  # type: ignore[return-value]
    kept = {name: v for name, v in model.state_dict().items() if name.startswith(("encoder.", "head."))}
    return model.encoder, kept  # type: ignore[return-value]


def first_conv(encoder: Encoder) -> str:
    """Return the name of the layer that reads pixels, in a model with the encoder under `encoder`."""
    assert isinstance(encoder, nn.Module)
    for name, module in encoder.named_modules(prefix="encoder"):
        if isinstance(module, nn.Conv2d):
            return name
    raise AssertionError("an encoder reads pixels by a convolution")
