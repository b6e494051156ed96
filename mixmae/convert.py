"""Weights in other people's names and files, and back. Now: the official MixMIM release (pretraining and finetuning).

Every other format is to be a pair of the same two functions, from_X and to_X, on plain dicts of tensors; reading a
file, loading into a model and the report are shared.

Official names against ours, which are those of methods.mixmae.MixMAE (encoder.*, decoder.*) and
finetune.classification.ImageClassifier (encoder.*, head.*):
    patch_embed.*, norm.*                    encoder.patch_embed.*, encoder.norm.*
    absolute_pos_embed                       encoder.pos_embed
    layers.I.blocks.J.*                      encoder.stages.I.blocks.J.*
    layers.I.downsample.* (END of stage I)   encoder.stages.(I+1).downsample.* (START of stage I+1)
    ...attn.relative_position_index          none: it follows from the size of the bias table
    mask_token, decoder_embed.*, ...         decoder.mask_token, decoder.embed.*, ...
    head.*                                   head.*
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import NUM_STAGES, PATCH_PX, SwinConfig
from mixmae.mixing import MASK_UNIT_PX

StateDict = dict[str, Tensor]

WRAPPERS = ("model", "state_dict")
"""Keys under which checkpoints keep the weights, beside an optimiser and the like."""

BIAS_TABLE = "relative_position_bias_table"
BIAS_INDEX = "relative_position_index"

DECODER_NUM_HEADS = {512: 16}
"""Heads of the official decoder by its width: the one released size. Shapes do not tell heads."""


def read_state_dict(path: Path | str) -> StateDict:
    """Read weights from a .safetensors file or a torch checkpoint, without running code from it.

    Args: path: the file; a torch checkpoint may hold the weights under "model" or "state_dict", and an
        argparse.Namespace beside them, as the official ones do.
    Returns: tensors by name, on the CPU.
    Raises: ValueError if the file is not a checkpoint, asks for anything but tensors and plain values, or holds no
        weights; FileNotFoundError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
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
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if content else {}
    if not tensors:
        raise ValueError(f"{path} holds no weights, neither at its top nor under {' or '.join(WRAPPERS)}")
    return tensors


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What came of loading weights into a model, by name."""

    matched: tuple[str, ...]
    """Loaded."""
    missing: tuple[str, ...]
    """In the model, not in the weights: kept as they were."""
    unexpected: tuple[str, ...]
    """In the weights, not in the model: ignored."""
    mismatched: tuple[str, ...]
    """In both, with different shapes: the model's were kept. Position tables of another input size are among these."""

    @property
    def matched_share(self) -> float:
        """Share of the model's own tensors that were loaded, 0 to 1."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        return len(self.matched) / max(1, total)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched ({self.matched_share:.1%})"]
        for label in ("missing", "unexpected", "mismatched"):
            names = getattr(self, label)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {label}" + (f" ({shown})" if names else ""))
        return ", ".join(parts)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Copy into a model the weights that fit it by name and shape, and say which did not.

    Args:
        model: in our names; changed in place.
        state: in our names, from from_official or another from_X.
    Returns: the report; it is for the caller to refuse a poor one.
    """
    own = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        matched=tuple(fitting),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(name for name in state if name in own and name not in fitting),
    )


def from_official(state: Mapping[str, Tensor]) -> StateDict:
    """Rename official MixMIM weights to ours.

    Args: state: a pretraining or a finetuning model of the official release.
    Returns: the same tensors under our names, without the relative position indices.
    Raises: ValueError if it is not such a model.
    """
    _check_official(state)
    return {_our_name(name): value for name, value in state.items() if not name.endswith(BIAS_INDEX)}


def to_official(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights to the official names: the inverse of from_official.

    Args: state: the state dict of a MixMAE or an ImageClassifier on a SwinEncoder.
    Returns: the same tensors, and the relative position index that the official classes keep beside each bias table.
    """
    official: StateDict = {}
    for name, value in state.items():
        renamed = _official_name(name)
        official[renamed] = value
        if renamed.endswith(BIAS_TABLE):
            official[renamed.replace(BIAS_TABLE, BIAS_INDEX)] = _relative_position_index(_window_size(renamed, value))
    return official


@dataclass(frozen=True, kw_only=True)
class OfficialConfigs:
    """The architecture that official weights belong to."""

    encoder: SwinConfig
    decoder: DecoderConfig | None
    """None for finetuning weights."""
    num_classes: int | None
    """None for pretraining weights."""


def config_from_official(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
) -> OfficialConfigs:
    """Read the architecture of official MixMIM weights off their shapes.

    Args:
        state: a pretraining or a finetuning model of the official release.
        image_size: side, or height and width, in pixels; default the square that the position table was made for. With
            another size the table does not fit, and the encoder keeps its own, which has the same formula.
        decoder_num_heads: shapes do not tell the heads of the decoder; needed unless it has the released width of 512.
    Returns: configs to build the models from. Drop path and the like are not in weights and keep their defaults.
    Raises: ValueError if it is not such a model, the size is not given and not square, or the decoder's heads are not
        known.
    """
    _check_official(state)
    embed_dim, in_channels, *_ = state["patch_embed.proj.weight"].shape
    if image_size is None:
        num_tokens = state["absolute_pos_embed"].shape[1]
        image_size = isqrt(num_tokens) * PATCH_PX
        if (image_size // PATCH_PX) ** 2 != num_tokens:
            raise ValueError(f"the position table has {num_tokens} tokens, which is no square: pass image_size")
    tables = [f"layers.{stage}.blocks.0.attn.{BIAS_TABLE}" for stage in range(NUM_STAGES)]
    encoder = SwinConfig(
        image_size=image_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depths=tuple(_count_blocks(state, f"layers.{stage}.blocks.") for stage in range(NUM_STAGES)),
        num_heads=tuple(state[table].shape[1] for table in tables),
        window_sizes=tuple(_window_size(table, state[table]) for table in tables),
        mlp_ratio=_mlp_ratio(state["layers.0.blocks.0.mlp.fc1.weight"]),
    )
    decoder = None
    if "decoder_embed.weight" in state:
        dim = state["decoder_embed.weight"].shape[0]
        num_heads = decoder_num_heads or DECODER_NUM_HEADS.get(dim)
        if num_heads is None:
            raise ValueError(f"shapes do not tell how many heads a decoder of width {dim} has: pass decoder_num_heads")
        decoder = DecoderConfig(
            dim=dim,
            depth=_count_blocks(state, "decoder_blocks."),
            num_heads=num_heads,
            mlp_ratio=_mlp_ratio(state["decoder_blocks.0.mlp.fc1.weight"]),
        )
        num_values = state["decoder_pred.weight"].shape[0]
        if num_values != MASK_UNIT_PX**2 * in_channels:
            raise ValueError(
                f"the decoder predicts {num_values} values a cell, not {MASK_UNIT_PX} px of {in_channels} channels"
            )
    num_classes = state["head.weight"].shape[0] if "head.weight" in state else None
    return OfficialConfigs(encoder=encoder, decoder=decoder, num_classes=num_classes)


def _check_official(state: Mapping[str, Tensor]) -> None:
    needed = ("patch_embed.proj.weight", "absolute_pos_embed", f"layers.3.blocks.0.attn.{BIAS_TABLE}", "norm.weight")
    absent = [name for name in needed if name not in state]
    if absent:
        some = ", ".join(list(state)[:3])
        raise ValueError(f"not an official MixMIM model: {absent[0]} is not in it (it starts with {some or 'nothing'})")


def _our_name(name: str) -> str:
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("decoder_"):
        return "decoder." + name.removeprefix("decoder_")
    if name.startswith("head."):
        return name
    if name == "absolute_pos_embed":
        return "encoder.pos_embed"
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found is None:
        return "encoder." + name
    stage, rest = int(found[1]), found[2]
    return f"encoder.stages.{stage + rest.startswith('downsample.')}.{rest}"


def _official_name(name: str) -> str:
    if name == "decoder.mask_token":
        return "mask_token"
    if name.startswith("decoder."):
        return "decoder_" + name.removeprefix("decoder.")
    if name == "encoder.pos_embed":
        return "absolute_pos_embed"
    name = name.removeprefix("encoder.")
    found = re.fullmatch(r"stages\.(\d+)\.(.+)", name)
    if found is None:
        return name
    stage, rest = int(found[1]), found[2]
    return f"layers.{stage - rest.startswith('downsample.')}.{rest}"


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _mlp_ratio(fc1: Tensor) -> float:
    return fc1.shape[0] / fc1.shape[1]


def _window_size(name: str, table: Tensor) -> int:
    side = isqrt(len(table))
    if side * side != len(table) or side % 2 == 0:
        raise ValueError(f"{name} has {len(table)} rows, which is (2w - 1)**2 for no window w")
    return (side + 1) // 2


def _relative_position_index(window: int) -> Tensor:
    """Number the row of the bias table for each pair of tokens in a window: (w*w, w*w) int64."""
    place = torch.arange(window)
    row, column = place.repeat_interleave(window), place.repeat(window)
    offset_row = row[:, None] - row + window - 1
    offset_column = column[:, None] - column + window - 1
    return offset_row * (2 * window - 1) + offset_column
