"""mmpretrain's port of MixMIM: the official model with other names, and another order of channels in patch merging.

    backbone.*, neck.*, head.fc.*            *, * (decoder_*, mask_token), head.*
    patch_embed.projection, ln1, ln2         patch_embed.proj, norm1, norm2
    ffn.layers.0.0, ffn.layers.1             mlp.fc1, mlp.fc2
    neck.ln1                                 decoder_norm

Legend: C channels of a token before merging. The official code concatenates the four merged tokens, each with its C
channels, in the order upper left, lower left, upper right, lower right. mmpretrain concatenates the channels, each with
its four values in row order. So the vectors of the norm and the columns of the reduction are permuted. The norms of its
decoder have eps 1e-6, not 1e-5 (found with tests/golden: 1e-5 differs by 1.2e-5, 1e-6 by 4e-7).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mixmae.convert.architecture import Architecture, StateDict, read_architecture
from mixmae.convert.names.official import from_official, to_official

DECODER_NORM_EPS = 1e-6

_PARTS = (
    ("patch_embed.projection.", "patch_embed.proj."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)
_DECODER_NORM = "neck.ln1."


def is_mmpretrain(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of mmpretrain's MixMIM."""
    return "backbone.absolute_pos_embed" in state and "backbone.patch_embed.projection.weight" in state


def from_mmpretrain(state: Mapping[str, Tensor]) -> StateDict:
    """Rename mmpretrain's MixMIM weights to ours and the channels of patch merging to our order.

    Args: state: a pretraining (backbone.*, neck.*) or a classification model (backbone.*, head.fc.*).
    Returns: our names; the relative position indices are left out.
    Raises: ValueError if it is not such a model.
    """
    if not is_mmpretrain(state):
        raise ValueError("not a MixMIM model of mmpretrain: backbone.absolute_pos_embed is not in it")
    official = {}
    for name, value in state.items():
        if ".downsample." in name:
            value = _merge_by_token(value)
        official[_official_name(name)] = value
    return from_official(official)


def to_mmpretrain(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights to mmpretrain's names and order: the inverse of from_mmpretrain. Args: as to_official."""
    renamed = {}
    for name, value in to_official(state).items():
        if ".downsample." in name:
            value = _merge_by_channel(value)
        renamed[_mmpretrain_name(name)] = value
    return renamed


def config_from_mmpretrain(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
) -> Architecture:
    """Read the architecture of mmpretrain's MixMIM weights off their shapes; see read_architecture."""
    found = read_architecture(from_mmpretrain(state), image_size, decoder_num_heads)
    return found if found.decoder is None else replace(found, decoder=replace(found.decoder, norm_eps=DECODER_NORM_EPS))


def _official_name(name: str) -> str:
    if name.startswith(_DECODER_NORM):
        return "decoder_norm." + name.removeprefix(_DECODER_NORM)
    name = re.sub(r"^(backbone|neck)\.", "", name)
    name = re.sub(r"^head\.fc\.", "head.", name)
    for theirs, official in _PARTS:
        name = name.replace(theirs, official)
    return name


def _mmpretrain_name(name: str) -> str:
    if name.startswith("decoder_norm."):
        return _DECODER_NORM + name.removeprefix("decoder_norm.")
    for theirs, official in _PARTS:
        name = name.replace(official, theirs)
    if name.startswith("head."):
        return "head.fc." + name.removeprefix("head.")
    return ("neck." if name.startswith(("decoder_", "mask_token")) else "backbone.") + name


def _merge_by_token(value: Tensor) -> Tensor:
    """(..., 4C), channel by channel -> (..., 4C), token by token. The rows of `reduction`
    (outputs) are not permuted, only its columns."""
    merged = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return merged.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # (..., column, row, C)


def _merge_by_channel(value: Tensor) -> Tensor:
    """The inverse of _merge_by_token."""
    merged = value.unflatten(-1, (2, 2, -1))  # (..., column, row, C)
    return merged.transpose(-3, -2).movedim(-1, -3).flatten(-3)  # (..., C, row, column)
