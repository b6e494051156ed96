"""Twins of timm and of its authors, who use the same names. Theirs and ours:

patch_embeds.I.*        encoder.stages.I.patch_embed.*
blocks.I.J.*            encoder.stages.I.blocks.J.*
pos_block.I.proj.0.*    encoder.stages.I.peg.proj.*
norm.*                  encoder.norm.*
head.*                  head.*
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmae.convert.architecture import StateDict
from mixmae.convert.names.renaming import rename

_TO_OURS = (
    (r"patch_embeds\.(\d)\.", r"encoder.stages.\1.patch_embed."),
    (r"blocks\.(\d)\.", r"encoder.stages.\1.blocks."),
    (r"pos_block\.(\d)\.proj\.0\.", r"encoder.stages.\1.peg.proj."),
    (r"norm\.", r"encoder.norm."),
)
_TO_TIMM = (
    (r"encoder\.stages\.(\d)\.patch_embed\.", r"patch_embeds.\1."),
    (r"encoder\.stages\.(\d)\.blocks\.", r"blocks.\1."),
    (r"encoder\.stages\.(\d)\.peg\.proj\.", r"pos_block.\1.proj.0."),
    (r"encoder\.norm\.", r"norm."),
)


def is_twins(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of timm's Twins."""
    return "patch_embeds.0.proj.weight" in state and "pos_block.0.proj.0.weight" in state


def from_twins(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of timm's Twins to ours."""
    return rename(state, _TO_OURS)


def to_twins(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights to timm's names: the inverse of from_twins."""
    return rename(state, _TO_TIMM)
