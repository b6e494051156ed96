"""Reading weights, and what is known about them, from files and folders in any known format; no code in them is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors

from mixmae.convert.architecture import StateDict, encoder_config, num_classes
from mixmae.convert.choice import choose_weights
from mixmae.convert.files import find_file, is_safetensors, read_content
from mixmae.convert.formats import FORMATS, detect_format
from mixmae.convert.metadata import METADATA_KEY, NOT_STATED, EncoderMetadata, Preprocessing, digest_of
from mixmae.convert.preprocessing_config import read_preprocessing
from mixmae.encoders.build import EncoderConfig, config_from_json
from mixmae.pixels import fit_normalisation, usual_normalisation
from mixmae.training.checkpoint import MODEL_FILE, STATE_FILE


def read_state_dict(path: Path | str, key: str | None = None) -> StateDict:
    """Read weights, with their own names, from a file of any kind, without running code from it.

    Args: path, key: as in read_weights.
    Returns: tensors by name, on the CPU, without the prefixes and keys before the names of a known format.
    Raises: ValueError if the file is not a checkpoint, contains more than tensors and plain values, or holds no
        weights of a known format; FileNotFoundError.
    """
    file = find_file(Path(path))
    return choose_weights(read_content(file), file, key)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of a file or folder of weights."""

    state: StateDict
    """Tensors by our names."""
    format: str
    """A key of FORMATS."""
    metadata: EncoderMetadata | None
    """None if the file has no metadata and the architecture cannot be read off the shapes."""
    unknown: str = ""
    """Why there is no metadata."""


def read_weights(
    path: Path | str,
    image_size: int | tuple[int, int] | None = None,
    encoder: EncoderConfig | None = None,
    key: str | None = None,
) -> Weights:
    """Read weights in any known format, rename them to ours, and find out what they are.

    Args:
        path: a safetensors file or a torch checkpoint; a run's checkpoint folder (state.json); a hub folder
            (config.json), or the index of weights in several files.
        image_size: side, or (height, width), in pixels, of the input that a foreign file was trained with; needed if
            it is not square.
        encoder: the architecture of a foreign file; needed if it cannot be read off the shapes.
        key: of one of several sets of weights, such as "model_ema" or "teacher"; see choose_weights.
    Returns: the weights. Foreign files do not contain the preprocessing: it is that of a config of timm or Hugging
        Face beside them, else the usual one (pixels.usual_normalisation).
    Raises: ValueError for an unreadable file, an unknown format, or weights that do not match their digest;
        FileNotFoundError.
    """
    path = Path(path)
    file = find_file(path)
    tensors = choose_weights(read_content(file), file, key)
    name = detect_format(tensors)
    state = FORMATS[name].to_ours(tensors)
    metadata = _own_metadata(file)
    if metadata is not None:
        if metadata.digest != digest_of(state):
            raise ValueError(f"{file} is damaged or was changed: its weights do not have the digest that it states")
        return Weights(state=state, format=name, metadata=metadata)
    is_run = file.name == MODEL_FILE and (file.parent / STATE_FILE).is_file()
    said = {} if is_run else read_preprocessing(file.parent)
    try:
        if is_run:
            metadata = _run_metadata(file.parent, state)
        else:
            source = {"format": FORMATS[name].title, "name": path.name, **({} if key is None else {"key": key})}
            metadata = _foreign_metadata(state, image_size, encoder, source, said)
    except ValueError as error:
        return Weights(state=state, format=name, metadata=None, unknown=str(error))
    return Weights(state=state, format=name, metadata=metadata)


def _own_metadata(file: Path) -> EncoderMetadata | None:
    """Read the metadata of an encoder file; None for other files."""
    if not is_safetensors(file):
        return None
    with safetensors.safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    return None if text is None else EncoderMetadata.from_json(json.loads(text))


def _foreign_metadata(
    state: StateDict,
    image_size: int | tuple[int, int] | None,
    encoder: EncoderConfig | None,
    source: Mapping[str, Any],
    said: Mapping[str, Any],
) -> EncoderMetadata:
    """Read metadata off the shapes of weights.

    Args: said: fields of Preprocessing that a config beside the file gives.  Others: as in read_weights.
    Raises: ValueError if they do not determine the architecture.
    """
    config = encoder or _encoder_config(state, image_size, said.get("image_size"))
    mean, std = usual_normalisation(config.in_channels)
    mean, std = fit_normalisation(said.get("mean", mean), said.get("std", std), config.in_channels)
    fields = {name: said[name] for name in ("interpolation", "crop_pct") if name in said}
    preprocessing = Preprocessing(image_size=config.image_sides, mean=mean, std=std, **fields)
    return EncoderMetadata(encoder=config, preprocessing=preprocessing, num_classes=num_classes(state), source=source)


def _encoder_config(
    state: StateDict, image_size: int | tuple[int, int] | None, said: tuple[int, int] | None
) -> EncoderConfig:
    """The config that the shapes tell; the input size that a config says counts where no square table tells it."""
    has_table = any(name.startswith("encoder.") and name.endswith("pos_embed") for name in state)
    if image_size is None and said is not None and not has_table:
        return encoder_config(state, said if said[0] != said[1] else said[0])
    try:
        return encoder_config(state, image_size)
    except ValueError:
        if image_size is not None or said is None:
            raise
        return encoder_config(state, said)


def _run_metadata(folder: Path, state: StateDict) -> EncoderMetadata:
    """Read the metadata of a run's checkpoint from its state.json.   Raises: ValueError if it is incomplete."""
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    source = {
        "format": "checkpoint of a run",
        "name": folder.name,
        "run_id": content.get("mlflow", {}).get("run_id", NOT_STATED),
        # Without the path of the data: exported files are published.
        "data": {key: value for key, value in content.get("data", {}).items() if key in ("name", "digest")},
        **{key: content[key] for key in ("position", "versions", "config", "classes") if key in content},
    }
    config = content.get("config", {})
    if "encoder" not in config:
        return _foreign_metadata(state, None, None, source, {})
    encoder = config_from_json(config["encoder"])
    size = config.get("augment", {}).get("image_size")
    if size is not None:
        encoder = replace(encoder, image_size=tuple(size) if isinstance(size, list) else size)
    pixels: dict[str, Any] = {
        name: tuple(config[f"pixel_{name}"]) for name in ("mean", "std") if f"pixel_{name}" in config
    }
    preprocessing = Preprocessing(image_size=encoder.image_sides, **pixels)
    return EncoderMetadata(encoder=encoder, preprocessing=preprocessing, num_classes=num_classes(state), source=source)
