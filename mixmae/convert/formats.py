"""The known formats of weights, recognised by the names of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mixmae.convert.architecture import StateDict, kind_of
from mixmae.convert.names.mae import from_mae, has_class_position, is_mae
from mixmae.convert.names.mmpretrain import from_mmpretrain, is_mmpretrain
from mixmae.convert.names.official import from_official, is_official
from mixmae.convert.names.pvt import from_pvt, from_timm_pvt_v2, is_pvt, is_timm_pvt_v2
from mixmae.convert.names.resnetv2 import from_timm_resnetv2, is_timm_resnetv2
from mixmae.convert.names.swin import (
    from_microsoft_swin,
    from_simmim_swin,
    from_timm_swin,
    is_microsoft_swin,
    is_simmim_swin,
    is_timm_swin,
)
from mixmae.convert.names.twins import from_twins, is_twins
from mixmae.probing.linear import fold_head


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to name weights."""

    name: str
    """What detect_format returns."""
    title: str
    """Its name in messages."""
    recognises: Callable[[Mapping[str, Tensor]], bool]
    """Whether the names are of this format; tried in the order of FORMATS."""
    to_ours: Callable[[Mapping[str, Tensor]], StateDict]
    """Renames weights to ours."""


def _is_ours(state: Mapping[str, Tensor]) -> bool:
    # Others put an encoder of timm's under the same prefix; a ViT's names are the same, and its table tells.
    inner = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    if is_mae(inner):
        return "cls_token" not in inner or not has_class_position(inner["pos_embed"])
    return is_timm_resnetv2(inner) or (_is_bare_encoder(inner) and not is_timm_pvt_v2(inner))


def _is_bare_encoder(state: Mapping[str, Tensor]) -> bool:
    # Our ResNets have no batch norms; those that have them use the same names otherwise.
    names = [name for name in state if name.startswith("stages.0.blocks.0.")]
    has_batch_norms = any(name.endswith("running_mean") for name in names)
    return bool(names) and not has_batch_norms and kind_of(_add_prefix(state)) is not None


def _add_prefix(state: Mapping[str, Tensor]) -> StateDict:
    return {f"encoder.{name}": value for name, value in state.items()}


FORMATS = {
    entry.name: entry
    for entry in (
        Format(name="mixmim", title="official MixMIM", recognises=is_official, to_ours=from_official),
        Format(name="mmpretrain", title="MixMIM of mmpretrain", recognises=is_mmpretrain, to_ours=from_mmpretrain),
        Format(name="simmim_swin", title="Swin of SimMIM", recognises=is_simmim_swin, to_ours=from_simmim_swin),
        Format(name="mixmae", title="mixmae's own", recognises=_is_ours, to_ours=fold_head),
        Format(name="timm_swin", title="Swin of timm", recognises=is_timm_swin, to_ours=from_timm_swin),
        Format(
            name="microsoft_swin",
            title="Swin of Microsoft",
            recognises=is_microsoft_swin,
            to_ours=from_microsoft_swin,
        ),
        Format(name="mae", title="ViT of MAE or timm", recognises=is_mae, to_ours=from_mae),
        Format(name="timm_pvt_v2", title="PVT v2 of timm", recognises=is_timm_pvt_v2, to_ours=from_timm_pvt_v2),
        Format(name="pvt", title="PVT of its authors", recognises=is_pvt, to_ours=from_pvt),
        Format(name="twins", title="Twins of timm", recognises=is_twins, to_ours=from_twins),
        Format(
            name="timm_resnetv2",
            title="ResNet v2 of timm",
            recognises=is_timm_resnetv2,
            to_ours=from_timm_resnetv2,
        ),
        Format(name="encoder", title="an encoder of mixmae alone", recognises=_is_bare_encoder, to_ours=_add_prefix),
    )
}
"""By name."""


def is_known(state: Mapping[str, Tensor]) -> bool:
    """Whether these names are of a known format."""
    return any(entry.recognises(state) for entry in FORMATS.values())


def detect_format(state: Mapping[str, Tensor]) -> str:
    """Detect the format of a state dict by its names.

    Returns: a key of FORMATS.
    Raises: ValueError that lists the known formats.
    """
    for entry in FORMATS.values():
        if entry.recognises(state):
            return entry.name
    raise ValueError(unknown_format(state))


def unknown_format(state: Mapping[str, Tensor]) -> str:
    """The sentence that names of no known format get; it lists the known ones."""
    known = ", ".join(entry.title for entry in FORMATS.values())
    some = ", ".join(list(state)[:3]) or "nothing"
    return f"these weights are in no known format (they start with {some}); known are: {known}"


def to_ours(state: Mapping[str, Tensor]) -> StateDict:
    """Rename weights in any known format to ours.   Raises: ValueError as detect_format."""
    return FORMATS[detect_format(state)].to_ours(state)
