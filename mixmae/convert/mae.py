"""Plain ViT, as MAE (and timm) name its weights: the encoder's names are ours, the positions and the decoder are not.

patch_embed.proj.*, cls_token, blocks.J.*, norm.*    encoder.*
pos_embed (1, 1 + L, C), the class token's first     encoder.pos_embed (1, L, C); the first is added to cls_token
mask_token, decoder_embed.*, decoder_blocks.K.*, ... decoder.mask_token, decoder.embed.*, decoder.blocks.K.*, ...
decoder_pos_embed (1, 1 + L, C)                      decoder.pos_embed (1, L, C)
head.*                                               head.*
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from mixmae.convert.architecture import StateDict


def is_mae(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are weights of a plain ViT."""
    return all(name in state for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"))


def from_mae(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of a plain ViT to ours.

    Args: state: an MAE of pretraining or finetuning, a timm ViT with a class token or without, or our own encoder.
    Returns: our names. The class token gets the position that is always added to it (in MAE it is zero).
    """
    ours: StateDict = {}
    num_positions = state["pos_embed"].shape[1]
    # Our own encoder has a class token, but no position for it.
    num_extra = int("cls_token" in state and isqrt(num_positions) ** 2 != num_positions)
    for name, value in state.items():
        if name == "cls_token":
            ours["encoder.cls_token"] = value + state["pos_embed"][:, :1] if num_extra else value
        elif name == "pos_embed":
            ours["encoder.pos_embed"] = value[:, num_extra:].contiguous()
        elif name == "decoder_pos_embed":
            ours["decoder.pos_embed"] = value[:, num_extra:].contiguous()
        elif name == "mask_token":
            ours["decoder.mask_token"] = value
        elif name.startswith("decoder_"):
            ours["decoder." + name.removeprefix("decoder_")] = value
        elif name.startswith("head."):
            ours[name] = value
        else:
            ours["encoder." + name] = value
    return ours
