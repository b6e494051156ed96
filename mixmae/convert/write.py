"""Encoder files: a safetensors file in our names (encoder.*, and head.* of a classifier) that says all about itself.

Its metadata has the architecture, the preprocessing, where the weights come from, and their digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from mixmae.convert.architecture import num_classes
from mixmae.convert.metadata import METADATA_KEY, NOT_STATED, EncoderMetadata, Preprocessing, digest_of
from mixmae.convert.models import encoder_state
from mixmae.writing import writing


def save_encoder(
    path: Path | str,
    model: nn.Module,
    preprocessing: Preprocessing,
    *,
    source: Mapping[str, Any] | None = None,
    data_licence: str = NOT_STATED,
    overwrite: bool = False,
) -> EncoderMetadata:
    """Write an encoder file.

    Args:
        path: where; usually encoder.safetensors.
        model: an encoder with its config, an ImageClassifier, or a method on an encoder; other parts are left out.
        preprocessing: what the encoder was trained with.
        source, data_licence: see EncoderMetadata.
        overwrite: replace a file that is there.
    Returns: the metadata that was written.
    Raises: ValueError if the file is there and overwrite is not set.
    """
    encoder, state = encoder_state(model)
    metadata = EncoderMetadata(
        encoder=encoder.config,  # type: ignore[attr-defined]
        preprocessing=preprocessing,
        num_classes=num_classes(state),
        source=source or {},
        data_licence=data_licence,
        digest=digest_of(state),
    )
    with writing(Path(path), overwrite=overwrite) as partial:
        save_tensors(partial, state, metadata)
    return metadata


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: EncoderMetadata) -> None:
    """Write tensors and metadata as a safetensors file."""
    safetensors.torch.save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        path,
        metadata={"format": "pt", METADATA_KEY: json.dumps(metadata.to_json())},
    )
    path.chmod(0o644)  # safetensors makes it private; weights are for others to read
