"""PVT v2 of timm, and both versions of their authors. Their names and ours:

timm (v2)               the authors            ours
patch_embed.*           patch_embed1.*         encoder.stages.0.patch_embed.*
stages.I.downsample.*   patch_embed(I+1).*     encoder.stages.I.patch_embed.*
stages.I.blocks.J.*     block(I+1).J.*         encoder.stages.I.blocks.J.*
...mlp.dwconv.*         ...mlp.dwconv.dwconv.* ...mlp.dwconv.*
stages.I.norm.*         norm(I+1).*            encoder.stages.I.norm.*         (v2)
                        pos_embed(I+1)         encoder.stages.I.pos_embed      (v1; (1, H*W, C), here (1, H, W, C))
                        norm.*                 encoder.norm.*                  (v1)
head.*                  head.*                 head.*

The authors' v1 has a class token in its last stage, and ours has none: the token, its position (the first of
pos_embed4) and the head that reads it are left out. The patches were trained to attend to it, so our features differ
from those of the published model. The authors' names are from their code (github.com/whai362/PVT); not tested with a
released file.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from mixmae.convert.architecture import StateDict
from mixmae.convert.names.renaming import rename

NUM_STAGES = 4
"""Stages of every published PVT."""

_TO_OURS = (
    (r"patch_embed\.", r"encoder.stages.0.patch_embed."),
    (r"stages\.(\d)\.downsample\.", r"encoder.stages.\1.patch_embed."),
    (r"stages\.", r"encoder.stages."),
)
_TO_TIMM = (
    (r"encoder\.stages\.0\.patch_embed\.", r"patch_embed."),
    (r"encoder\.stages\.(\d)\.patch_embed\.", r"stages.\1.downsample."),
    (r"encoder\.stages\.", r"stages."),
)


def is_timm_pvt_v2(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of timm's PVT v2."""
    return "patch_embed.proj.weight" in state and "stages.1.downsample.proj.weight" in state


def from_timm_pvt_v2(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of timm's PVT v2 to ours."""
    return rename(state, _TO_OURS)


def to_timm_pvt_v2(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights of a PVT v2 to timm's names: the inverse of from_timm_pvt_v2."""
    return rename(state, _TO_TIMM)


def is_pvt(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a PVT of its authors."""
    return "patch_embed1.proj.weight" in state and "block1.0.attn.q.weight" in state


def from_pvt(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of a PVT of its authors, v1 or v2, to ours.

    Raises: ValueError if a position table is not square.
    """
    kept = dict(state)
    if kept.pop("cls_token", None) is not None:
        last = f"pos_embed{NUM_STAGES}"
        kept[last] = kept[last][:, 1:]
        kept = {name: value for name, value in kept.items() if not name.startswith("head.")}
    rules = [
        rule
        for stage in range(NUM_STAGES)
        for rule in (
            (rf"patch_embed{stage + 1}\.", rf"encoder.stages.{stage}.patch_embed."),
            (rf"pos_embed{stage + 1}$", rf"encoder.stages.{stage}.pos_embed"),
            (rf"block{stage + 1}\.(\d+)\.mlp\.dwconv\.dwconv\.", rf"encoder.stages.{stage}.blocks.\1.mlp.dwconv."),
            (rf"block{stage + 1}\.", rf"encoder.stages.{stage}.blocks."),
            (rf"norm{stage + 1}\.", rf"encoder.stages.{stage}.norm."),
        )
    ]
    ours = rename(kept, [*rules, (r"norm\.", r"encoder.norm.")])
    return {name: _on_grid(name, value) if name.endswith("pos_embed") else value for name, value in ours.items()}


def _on_grid(name: str, table: Tensor) -> Tensor:
    """(1, H*W, C) -> (1, H, W, C), with H = W."""
    side = isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"the position table {name} has {table.shape[1]} tokens, which is not a square")
    return table.unflatten(1, (side, side)).contiguous()
