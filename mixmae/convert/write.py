"""Writing encoder files: safetensors files in our names (encoder.*, and head.* of a classifier).

Their metadata has all that is needed to use them: the architecture, the preprocessing, the source, and the digest.
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
        path: of the file, usually encoder.safetensors.
        model: an encoder with its config, an ImageClassifier, or a method on an encoder; a decoder is left out.
        preprocessing: what the encoder was trained with.
        source, data_licence: see EncoderMetadata.
        overwrite: replace an existing file.
    Returns: the metadata that was written.
    Raises: ValueError if the file exists and overwrite is False.
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
    """Write tensors and metadata as a safetensors file, replacing an existing one."""
    safetensors.torch.save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        path,
        metadata={"format": "pt", METADATA_KEY: json.dumps(metadata.to_json())},
    )
    path.chmod(0o644)  # safetensors creates it readable by its owner alone
