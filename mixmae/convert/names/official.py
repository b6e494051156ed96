"""The official MixMIM release: pretraining and finetuning models.

Official names and ours, which are those of methods.mixmae.MixMAE (encoder.*, decoder.*) and
finetune.classification.ImageClassifier (encoder.*, head.*):
    patch_embed.*, norm.*                    encoder.patch_embed.*, encoder.norm.*
    absolute_pos_embed                       encoder.pos_embed
    layers.I.blocks.J.*                      encoder.stages.I.blocks.J.*
    layers.I.downsample.* (END of stage I)   encoder.stages.(I+1).downsample.* (START of stage I+1)
    ...attn.relative_position_index          none: follows from the size of the bias table
    mask_token, decoder_embed.*, ...         decoder.mask_token, decoder.embed.*, ...
    head.*                                   head.*
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mixmae.convert.architecture import BIAS_TABLE, Architecture, StateDict, read_architecture, window_size

BIAS_INDEX = "relative_position_index"
NEEDED = ("patch_embed.proj.weight", "absolute_pos_embed", f"layers.1.blocks.0.attn.{BIAS_TABLE}", "norm.weight")
"""Names that every official model has."""


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of an official MixMIM model."""
    return all(name in state for name in NEEDED)


def from_official(state: Mapping[str, Tensor]) -> StateDict:
    """Rename official MixMIM weights to ours.

    Args: state: a pretraining or a finetuning model of the official release.
    Returns: the same tensors under our names, without the relative position indices.
    Raises: ValueError if it is not such a model.
    """
    absent = [name for name in NEEDED if name not in state]
    if absent:
        some = ", ".join(list(state)[:3])
        raise ValueError(f"not an official MixMIM model: {absent[0]} is not in it (it starts with {some or 'nothing'})")
    return {_our_name(name): value for name, value in state.items() if not name.endswith(BIAS_INDEX)}


def to_official(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights to the official names: the inverse of from_official.

    Args: state: the state dict of a MixMAE, an ImageClassifier or an encoder alone; the encoder is the paper's Swin.
    Returns: the same tensors, and the relative position index that the official classes store with each bias table.
    """
    official: StateDict = {}
    for name, value in state.items():
        renamed = _official_name(name)
        official[renamed] = value
        if renamed.endswith(BIAS_TABLE):
            official[renamed.replace(BIAS_TABLE, BIAS_INDEX)] = _relative_position_index(window_size(renamed, value))
    return official


def config_from_official(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
) -> Architecture:
    """Read the architecture of official MixMIM weights off their shapes; see read_architecture.

    Raises: ValueError if it is not such a model, and as read_architecture.
    """
    return read_architecture(from_official(state), image_size, decoder_num_heads)


def _our_name(name: str) -> str:
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("decoder_"):
        return "decoder." + name.removeprefix("decoder_")
    if name.startswith("head."):
        return name
    if name == "absolute_pos_embed":
        return "encoder.pos_embed"
    return stage_name(name, downsample_shift=1)


def stage_name(name: str, *, downsample_shift: int) -> str:
    """Rename a tensor of a Swin's encoder, layers.I..., to ours.

    Args: downsample_shift: 1 if a stage ends with its downsampling, 0 if it starts with it, as ours.
    """
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found is None:
        return "encoder." + name
    stage, rest = int(found[1]), found[2]
    return f"encoder.stages.{stage + downsample_shift * rest.startswith('downsample.')}.{rest}"


def _official_name(name: str) -> str:
    if name == "decoder.mask_token":
        return "mask_token"
    if name.startswith("decoder."):
        return "decoder_" + name.removeprefix("decoder.")
    name = name.removeprefix("encoder.")
    if name == "pos_embed":
        return "absolute_pos_embed"
    found = re.fullmatch(r"stages\.(\d+)\.(.+)", name)
    if found is None:
        return name
    stage, rest = int(found[1]), found[2]
    return f"layers.{stage - rest.startswith('downsample.')}.{rest}"


def _relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each pair of tokens in a window of side w: (w*w, w*w) int64."""
    index = torch.arange(window)
    row, column = index.repeat_interleave(window), index.repeat(window)
    offset_row = row[:, None] - row + window - 1
    offset_column = column[:, None] - column + window - 1
    return offset_row * (2 * window - 1) + offset_column
