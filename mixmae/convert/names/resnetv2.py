"""ResNet v2 (BiT) of timm: the names in the encoder are ours; the classifier is a 1 x 1 convolution.

stem.*, stages.*, norm.*        encoder.*
head.fc.* (classes, C, 1, 1)    head.* (classes, C)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmae.convert.architecture import StateDict
from mixmae.convert.names.renaming import rename

_HEAD = "head.weight"


def is_timm_resnetv2(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a ResNet v2 with group norms and standardised weights, as BiT's."""
    first = "stages.0.blocks.0.norm1."
    return "stem.conv.weight" in state and f"{first}weight" in state and f"{first}running_mean" not in state


def from_timm_resnetv2(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of timm's ResNet v2 to ours."""
    ours = rename(state, ((r"head\.fc\.", r"head."), (r"", r"encoder.")))
    if _HEAD in ours:
        ours[_HEAD] = ours[_HEAD].flatten(1)
    return ours


def to_timm_resnetv2(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our weights of a ResNet v2 to timm's names: the inverse of from_timm_resnetv2."""
    theirs = rename(state, ((r"head\.", r"head.fc."), (r"encoder\.", r"")))
    if "head.fc.weight" in theirs:
        theirs["head.fc.weight"] = theirs["head.fc.weight"][:, :, None, None]
    return theirs
