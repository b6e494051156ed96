"""Plain Swin of timm, Microsoft and SimMIM: shifted windows, no absolute positions.

In timm a stage starts with its downsampling, as ours, and the classifier is head.fc. In Microsoft's code a stage ends
with it, and indices and masks that follow from the sizes are stored. SimMIM has Microsoft's names below "encoder.". All
three merge patches in our order of channels. The rest of SimMIM, and the names in methods.simmim.SimMIM:
    encoder.mask_token (1, 1, C)             mask_token (C,)
    decoder.0.* (D to 3 * s * s, 1 x 1)      decoder.pred.*, rows in the order (row, column, channel)

Legend: C width of a token in the first stage, D in the last, s the side of the last stage's tokens in pixels. SimMIM's
decoder ends in a pixel shuffle, which takes channels in the order (channel, row, column).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmae.convert.architecture import BIAS_TABLE, StateDict
from mixmae.convert.names.official import BIAS_INDEX, stage_name

_FIRST_TABLE = f"layers.0.blocks.0.attn.{BIAS_TABLE}"
_DERIVED = (BIAS_INDEX, "attn_mask")


def is_timm_swin(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of timm's Swin."""
    return _FIRST_TABLE in state and "layers.1.downsample.norm.weight" in state and not is_microsoft_swin(state)


def is_microsoft_swin(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of Microsoft's Swin, without absolute positions."""
    ends_with_merging = "layers.0.downsample.norm.weight" in state
    return _FIRST_TABLE in state and ends_with_merging and "absolute_pos_embed" not in state


def is_simmim_swin(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of SimMIM's pretraining of a Swin."""
    return is_microsoft_swin(
        {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    )


def from_timm_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of timm's Swin to ours."""
    return _rename(state, downsample_shift=0)


def from_microsoft_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of Microsoft's Swin to ours."""
    return _rename(state, downsample_shift=1)


def from_simmim_swin(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of SimMIM's Swin to those of methods.simmim.SimMIM on a SwinEncoder."""
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    rest = {}
    if "mask_token" in encoder:
        rest["mask_token"] = encoder.pop("mask_token").flatten()
    if "decoder.0.weight" in state:
        in_channels = encoder["patch_embed.proj.weight"].shape[1]
        rest["decoder.pred.weight"] = _pixel_by_pixel(state["decoder.0.weight"].flatten(1), in_channels)
        rest["decoder.pred.bias"] = _pixel_by_pixel(state["decoder.0.bias"], in_channels)
    return from_microsoft_swin(encoder) | rest


def _pixel_by_pixel(value: Tensor, in_channels: int) -> Tensor:
    """(channels * s * s, ...), channel by channel -> (s * s * channels, ...), pixel by pixel."""
    return value.unflatten(0, (in_channels, -1)).transpose(0, 1).flatten(0, 1)


def _rename(state: Mapping[str, Tensor], *, downsample_shift: int) -> StateDict:
    return {
        name.replace("head.fc.", "head.") if name.startswith("head.") else stage_name(
            name, downsample_shift=downsample_shift
        ): value
        for name, value in state.items()
        if not name.endswith(_DERIVED)
    }  # fmt: skip
