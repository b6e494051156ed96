"""Reading weights, and what is known about them, from files and folders in any known format; no code in them is run."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mixmae.convert.architecture import StateDict, encoder_config, num_classes
from mixmae.convert.formats import FORMATS, detect_format
from mixmae.convert.metadata import METADATA_KEY, NOT_STATED, EncoderMetadata, Preprocessing, digest_of
from mixmae.encoders.build import EncoderConfig, config_from_json
from mixmae.pixels import usual_normalisation
from mixmae.training.checkpoint import MODEL_FILE, STATE_FILE

WRAPPERS = ("model", "state_dict")
"""Keys of checkpoints that hold the weights; other keys hold the optimizer and the like."""

WRAPPING_MODULES = re.compile(r"^(module\.|_orig_mod\.)+")
"""Prefixes that DDP and torch.compile add to the names."""

SAFE_GLOBALS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
"""Classes allowed in checkpoints: the arguments in official ones; the config in Microsoft's, read as a dict."""


def read_state_dict(path: Path | str) -> StateDict:
    """Read weights, with their own names, from a .safetensors file or a torch checkpoint, without running code from it.

    Args: path: the file, or a folder that read_weights takes; a torch checkpoint may hold the weights under "model" or
        "state_dict", and an argparse.Namespace or a yacs config beside them, as the official ones do.
    Returns: tensors by name, on the CPU.
    Raises: ValueError if the file is not a checkpoint, contains more than tensors and plain values, or holds no
        weights; FileNotFoundError.
    """
    path = _find_file(Path(path))
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} was not read: it is damaged, or contains more than tensors and plain values, which could run "
            f"code; ask its author for a safetensors file ({str(error).splitlines()[0]})"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {WRAPPING_MODULES.sub("", name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights, neither at its top nor under {' or '.join(WRAPPERS)}")
    return tensors


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
    path: Path | str, image_size: int | tuple[int, int] | None = None, encoder: EncoderConfig | None = None
) -> Weights:
    """Read weights in any known format, rename them to ours, and find out what they are.

    Args:
        path: a .safetensors file or a torch checkpoint; a run's checkpoint folder (state.json); a hub folder
            (config.json).
        image_size: side, or (height, width), in pixels, of the input that a foreign file was trained with; needed if
            it is not square.
        encoder: the architecture of a foreign file; needed if it cannot be read off the shapes.
    Returns: the weights. Foreign files do not contain the preprocessing: ImageNet's mean and std are assumed.
    Raises: ValueError for an unreadable file, an unknown format, or weights that do not match their digest;
        FileNotFoundError.
    """
    path = Path(path)
    file = _find_file(path)
    tensors = read_state_dict(file)
    name = detect_format(tensors)
    state = FORMATS[name].to_ours(tensors)
    metadata = _own_metadata(file)
    if metadata is not None:
        if metadata.digest != digest_of(state):
            raise ValueError(f"{file} is damaged or was changed: its weights do not have the digest that it states")
        return Weights(state=state, format=name, metadata=metadata)
    is_run = file.name == MODEL_FILE and (file.parent / STATE_FILE).is_file()
    try:
        if is_run:
            metadata = _run_metadata(file.parent, state)
        else:
            metadata = _foreign_metadata(state, image_size, encoder, {"format": FORMATS[name].title, "name": path.name})
    except ValueError as error:
        return Weights(state=state, format=name, metadata=None, unknown=str(error))
    return Weights(state=state, format=name, metadata=metadata)


def _find_file(path: Path) -> Path:
    """Find the file of weights that a path leads to.   Raises: ValueError, FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return path
    for name in (MODEL_FILE, "encoder.safetensors", "classifier.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    checkpoints = sorted(path.glob("**/step_*/" + MODEL_FILE))
    hint = f": choose one of its checkpoints, such as {checkpoints[-1].parent}" if checkpoints else ""
    raise ValueError(f"{path} is a folder without {MODEL_FILE}{hint}")


def _own_metadata(file: Path) -> EncoderMetadata | None:
    """Read the metadata of an encoder file; None for other files."""
    if file.suffix != ".safetensors":
        return None
    with safetensors.safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    return None if text is None else EncoderMetadata.from_json(json.loads(text))


def _foreign_metadata(
    state: StateDict,
    image_size: int | tuple[int, int] | None,
    encoder: EncoderConfig | None,
    source: Mapping[str, Any],
) -> EncoderMetadata:
    """Read metadata off the shapes of weights.   Raises: ValueError if they do not determine the architecture."""
    config = encoder or encoder_config(state, image_size)
    mean, std = usual_normalisation(config.in_channels)
    preprocessing = Preprocessing(image_size=config.image_sides, mean=mean, std=std)
    return EncoderMetadata(encoder=config, preprocessing=preprocessing, num_classes=num_classes(state), source=source)


def _run_metadata(folder: Path, state: StateDict) -> EncoderMetadata:
    """Read the metadata of a run's checkpoint from its state.json.   Raises: ValueError if it is incomplete."""
    content = json.loads((folder / STATE_FILE).read_text())
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
        return _foreign_metadata(state, None, None, source)
    encoder = config_from_json(config["encoder"])
    size = config.get("augment", {}).get("image_size")
    if size is not None:
        encoder = replace(encoder, image_size=tuple(size) if isinstance(size, list) else size)
    pixels: dict[str, Any] = {
        name: tuple(config[f"pixel_{name}"]) for name in ("mean", "std") if f"pixel_{name}" in config
    }
    preprocessing = Preprocessing(image_size=encoder.image_sides, **pixels)
    return EncoderMetadata(encoder=encoder, preprocessing=preprocessing, num_classes=num_classes(state), source=source)
