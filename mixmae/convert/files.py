"""Files and folders of weights: read without running code, written whole or not at all, with what they hold.

An encoder file is a safetensors file in our names (encoder.*, and head.* of a classifier) whose metadata says all that
is needed to use it: the architecture, the preprocessing, where the weights come from, and their digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mixmae.convert.architecture import StateDict, describe, encoder_config, num_classes
from mixmae.convert.formats import FORMATS, detect_format
from mixmae.encoders.base import Encoder
from mixmae.encoders.build import EncoderConfig, build_encoder, config_from_json, config_to_json
from mixmae.finetune.classification import ImageClassifier
from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD
from mixmae.writing import writing

WRAPPERS = ("model", "state_dict")
"""Keys under which checkpoints keep the weights, beside an optimiser and the like."""

WRAPPING_MODULES = re.compile(r"^(module\.|_orig_mod\.)+")
"""What DDP and torch.compile put before the names."""

METADATA_KEY = "mixmae"
"""Where an encoder file and a hub folder's config.json keep their metadata."""

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.json"


NOT_STATED = "not stated"


SAFE_GLOBALS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
"""What may lie beside the weights: the arguments of official checkpoints; the config of Microsoft's, read as a dict."""


def read_state_dict(path: Path | str) -> StateDict:
    """Read weights as they are from a .safetensors file or a torch checkpoint, without running code from it.

    Args: path: the file, or a folder that read_weights takes; a torch checkpoint may hold the weights under "model" or
        "state_dict", and an argparse.Namespace or a yacs config beside them, as the official ones do.
    Returns: tensors by name, on the CPU.
    Raises: ValueError if the file is not a checkpoint, asks for anything but tensors and plain values, or holds no
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
            f"{path} was not read: it is damaged, or asks for more than tensors and plain values, which could run "
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
class Preprocessing:
    """What an image goes through before the encoder: resize, centre crop, scale to 0..1, normalise."""

    image_size: tuple[int, int]
    """(H, W) in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from pixels in 0..1, a value a channel."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divides the difference."""
    interpolation: str = "bicubic"
    """How images are resized."""


@dataclass(frozen=True, kw_only=True)
class EncoderMetadata:
    """All that is needed to use the weights of an encoder, or of a classifier on one."""

    encoder: EncoderConfig
    """The architecture."""
    preprocessing: Preprocessing
    """What it expects of images."""
    num_classes: int | None = None
    """Classes of the head; None for an encoder alone."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from: the format and the name of their file; for a run also its step, data and config."""
    data_licence: str = NOT_STATED
    """What the licence of the training data says of such weights, in the words of who exported them."""
    digest: str = ""
    """digest_of the weights."""

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values."""
        values = {name: getattr(self, name) for name in ("num_classes", "data_licence", "digest")}
        parts = {"encoder": config_to_json(self.encoder), "preprocessing": asdict(self.preprocessing)}
        return {**parts, **values, "source": dict(self.source)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EncoderMetadata:
        """Read what to_json wrote.   Raises: ValueError if it is something else."""
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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file or folder turned out to hold."""

    state: StateDict
    """In our names."""
    format: str
    """A key of FORMATS."""
    metadata: EncoderMetadata | None
    """None where the file says nothing and the shapes do not tell the architecture."""
    unknown: str = ""
    """Why not."""


def read_weights(
    path: Path | str, image_size: int | tuple[int, int] | None = None, encoder: EncoderConfig | None = None
) -> Weights:
    """Read weights of any known format, rename them to ours, and say what they are.

    Args:
        path: a .safetensors file or a torch checkpoint; a run's checkpoint folder (state.json); a hub folder
            (config.json).
        image_size: side, or height and width, that a foreign file was made for, where it is not square.
        encoder: the architecture of a foreign file, where shapes do not tell it.
    Returns: the weights. Foreign files say nothing of preprocessing: ImageNet's mean and std are assumed.
    Raises: ValueError for an unreadable file, an unknown format, or weights that are not those of the digest;
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


def load_encoder(
    path: Path | str, image_size: int | tuple[int, int] | None = None, encoder: EncoderConfig | None = None
) -> tuple[Encoder, EncoderMetadata]:
    """Build the encoder that a file describes, with the file's weights.

    Args: as in read_weights.
    Returns: the encoder, and what the file says of it; a head or a decoder is left out.
    Raises: ValueError if the architecture is not known or the weights are not its own, and as read_weights.
    """
    weights = read_weights(path, image_size, encoder)
    model, metadata = build_model(weights, path)
    return model.encoder if isinstance(model, ImageClassifier) else model, metadata  # type: ignore[return-value]


def build_model(weights: Weights, path: Path | str) -> tuple[nn.Module, EncoderMetadata]:
    """Build the encoder, or the classifier if there is a head, that weights belong to, and fill it with them.

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
    """Give a model's encoder, and its weights in our names with those of the linear head, if there is one."""
    if not hasattr(model, "encoder"):
        return model, {f"encoder.{name}": value for name, value in model.state_dict().items()}  # type: ignore[return-value]
    kept = {name: v for name, v in model.state_dict().items() if name.startswith(("encoder.", "head."))}
    return model.encoder, kept  # type: ignore[return-value]


def first_conv(encoder: Encoder) -> str:
    """Give the name, in a model that has the encoder, of the layer that reads pixels."""
    assert isinstance(encoder, nn.Module)
    for name, module in encoder.named_modules(prefix="encoder"):
        if isinstance(module, nn.Conv2d):
            return name
    raise AssertionError("an encoder reads pixels by a convolution")


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of weights: of names, dtypes, shapes and bytes, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _find_file(path: Path) -> Path:
    """The file that holds the weights of a path.   Raises: ValueError, FileNotFoundError."""
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
    """What an encoder file says of itself; None for other files."""
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
    """What the shapes of weights say.   Raises: ValueError if they do not tell the architecture."""
    config = encoder or encoder_config(state, image_size)
    preprocessing = Preprocessing(image_size=config.image_sides)
    return EncoderMetadata(encoder=config, preprocessing=preprocessing, num_classes=num_classes(state), source=source)


def _run_metadata(folder: Path, state: StateDict) -> EncoderMetadata:
    """What the state.json of a run's checkpoint says of its weights.   Raises: ValueError if too little."""
    content = json.loads((folder / STATE_FILE).read_text())
    source = {
        "format": "checkpoint of a run",
        "name": folder.name,
        "run_id": content.get("mlflow", {}).get("run_id", NOT_STATED),
        # Not where the data are: such files are published.
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
