"""Plain Swin: shifted windows and no absolute positions, as timm, Microsoft and SimMIM name its weights.

timm starts a stage with its downsampling (as we do) and calls the classifier head.fc; Microsoft ends it with that and
stores indices and masks that follow from the sizes; SimMIM is Microsoft's below "encoder.", with a mask token and a
one-layer decoder. The order of channels where patches merge is ours in all three.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmae.convert.architecture import BIAS_TABLE, StateDict
from mixmae.convert.official import BIAS_INDEX, stage_name

_FIRST_TABLE = f"layers.0.blocks.0.attn.{BIAS_TABLE}"
_DERIVED = (BIAS_INDEX, "attn_mask")


def is_timm_swin(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are weights of timm's Swin."""
    return _FIRST_TABLE in state and "layers.1.downsample.norm.weight" in state and not is_microsoft_swin(state)


def is_microsoft_swin(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are weights of Microsoft's Swin, without absolute positions."""
    ends_with_merging = "layers.0.downsample.norm.weight" in state
    return _FIRST_TABLE in state and ends_with_merging and "absolute_pos_embed" not in state


def is_simmim_swin(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are weights of SimMIM's pretraining of a Swin."""
    return f"encoder.{_FIRST_TABLE}" in state


def from_timm_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of timm's Swin to ours."""
    return _rename(state, downsample_shift=0)


def from_microsoft_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of Microsoft's Swin to ours."""
    return _rename(state, downsample_shift=1)


def from_simmim_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of SimMIM's Swin to ours; its mask token and decoder keep their names, which nothing loads."""
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    rest = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    if "mask_token" in encoder:
        rest["mask_token"] = encoder.pop("mask_token")
    return from_microsoft_swin(encoder) | rest


def _rename(state: Mapping[str, Tensor], *, downsample_shift: int) -> StateDict:
    return {
        name.replace("head.fc.", "head.") if name.startswith("head.") else stage_name(
            name, downsample_shift=downsample_shift
        ): value
        for name, value in state.items()
        if not name.endswith(_DERIVED)
    }  # fmt: skip
