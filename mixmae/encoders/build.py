"""Encoders by their configs: built, named, and written as JSON.

A new encoder is a line in EncoderConfig and in _ENCODERS, and its module among those of SIZES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from mixmae.encoders import pvt, resnetv2, swin, twins, vit
from mixmae.encoders.base import Encoder
from mixmae.encoders.pvt import PvtConfig, PvtEncoder
from mixmae.encoders.resnetv2 import ResNetV2Config, ResNetV2Encoder
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.encoders.twins import TwinsConfig, TwinsEncoder
from mixmae.encoders.vit import ViTConfig, ViTEncoder

EncoderConfig = SwinConfig | PvtConfig | TwinsConfig | ViTConfig | ResNetV2Config
"""The architecture of any encoder."""

_ENCODERS: dict[type, Callable[[Any], Encoder]] = {
    SwinConfig: SwinEncoder,
    PvtConfig: PvtEncoder,
    TwinsConfig: TwinsEncoder,
    ViTConfig: ViTEncoder,
    ResNetV2Config: ResNetV2Encoder,
}

SIZES: dict[str, Callable[[], EncoderConfig]] = {
    size.__name__: size for module in (swin, pvt, twins, vit, resnetv2) for size in module.SIZES
}
"""The known sizes by name."""

OFFICIAL_WINDOWS = {384: (16, 16, 24, 12)}
"""Windows of the paper's Swin by input size, where they differ from those at 224 px (the official code)."""


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build the encoder that a config describes, with fresh weights."""
    return _ENCODERS[type(config)](config)


def config_at_size(config: EncoderConfig, image_size: int | tuple[int, int]) -> EncoderConfig:
    """Give the config for another input size.

    At 384 px the default windows of the paper's Swin are replaced by those of the official 384 px models. In all other
    cases the windows stay, and grids that they do not divide are padded.
    """
    if isinstance(config, SwinConfig) and config.window_sizes == SwinConfig().window_sizes:
        known = OFFICIAL_WINDOWS.get(image_size) if isinstance(image_size, int) else None
        config = replace(config, window_sizes=known or config.window_sizes)
    return replace(config, image_size=image_size)


def size_name(config: EncoderConfig) -> str | None:
    """Find the known size that a config is, whatever its input size, channels and drop path; None if there is none."""
    for name, size in SIZES.items():
        known = size()
        if type(known) is type(config):
            known = replace(known, image_size=config.image_size, in_channels=config.in_channels)
            if replace(known, drop_path=config.drop_path) == config:
                return name
    return None


def config_to_json(config: EncoderConfig) -> dict[str, Any]:
    """Write a config as JSON values: its type and all its fields."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {"type": type(config).__name__, **values}


def config_from_json(content: Mapping[str, Any]) -> EncoderConfig:
    """Read what config_to_json wrote.

    Args: content: without a "type" it is a SwinConfig: the first runs wrote none.
    Returns: the config; fields that are not in content have their defaults.
    Raises: ValueError for an unknown type or field, or a value that does not fit.
    """
    values = dict(content)
    name = values.pop("type", SwinConfig.__name__)
    known = {config.__name__: config for config in _ENCODERS}
    if name not in known:
        raise ValueError(f"there is no encoder config {name!r}; known are {', '.join(known)}: use a newer mixmae")
    config = known[name]
    unknown = sorted(values.keys() - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}: the file was written by another version of mixmae")
    try:
        return config(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"these values do not make a {name}: {error}") from error
