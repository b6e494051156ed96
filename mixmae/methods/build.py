"""The objectives by their configs: a new one is a line in MethodConfig and in _METHODS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mixmae.encoders.base import Encoder
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig

MethodConfig = MixMAEConfig | SimMIMConfig | MAEConfig
"""Any objective. All methods are called as model(images, generator=..., first_sample=..., with_pictures=...) and have
the steps draw, encode, decode, targets, reconstruction_loss and pictures (tests/contract/test_methods.py)."""

_METHODS: dict[type, Callable[[Any, Any], nn.Module]] = {MixMAEConfig: MixMAE, SimMIMConfig: SimMIM, MAEConfig: MAE}


def build_method(encoder: Encoder, config: MethodConfig) -> nn.Module:
    """Put an objective around an encoder.   Raises: ValueError if the encoder cannot do what the objective needs."""
    return _METHODS[type(config)](encoder, config)
