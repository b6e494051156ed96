"""Plain ViT of MAE and timm: the names in the encoder are ours; the positions and the decoder differ.

patch_embed.proj.*, cls_token, blocks.J.*, norm.*    encoder.*
pos_embed (1, 1 + L, C), the class token's first     encoder.pos_embed (1, L, C); the first is added to cls_token
mask_token, decoder_embed.*, decoder_blocks.K.*, ... decoder.mask_token, decoder.embed.*, decoder.blocks.K.*, ...
decoder_pos_embed (1, 1 + L, C)                      decoder.pos_embed (1, L, C)
head.*                                               head.*, if there is no class token and pooling follows the norm

Other heads are left out: they read the class token, or the mean of the patches before the norm (fc_norm), which
ImageClassifier does not compute. The norms of MAE's decoder have eps 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor

from mixmae.convert.architecture import Architecture, StateDict, read_architecture
from mixmae.layers.positions import sin_cos_positions

DECODER_NORM_EPS = 1e-6


def is_mae(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a plain ViT."""
    return all(name in state for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"))


def from_mae(state: Mapping[str, Tensor]) -> StateDict:
    """Rename the weights of a plain ViT to ours.

    Args: state: an MAE of pretraining or finetuning, a timm ViT with or without a class token, or our own encoder.
    Returns: our names. The class token gets the position that is always added to it (in MAE it is zero).
    """
    ours: StateDict = {}
    num_extra = int("cls_token" in state and has_class_position(state["pos_embed"]))
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
            if "cls_token" not in state and "norm.weight" in state:
                ours[name] = value
        else:
            ours["encoder." + name] = value
    return ours


def config_from_mae(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
) -> Architecture:
    """Read the architecture of MAE's weights off their shapes; see read_architecture."""
    found = read_architecture(from_mae(state), image_size, decoder_num_heads)
    return found if found.decoder is None else replace(found, decoder=replace(found.decoder, norm_eps=DECODER_NORM_EPS))


def has_class_position(table: Tensor) -> bool:
    """Whether the position table of a model with a class token begins with the class token's position.

    The grids of published models are square, so that a square length means no. Our own table may have any grid: it
    begins with the first row of the sin-cos table.
    """
    if isqrt(table.shape[1]) ** 2 == table.shape[1]:
        return False
    return table.shape[2] % 4 > 0 or not torch.equal(table[0, 0], sin_cos_positions(table.shape[2], (1, 1))[0])
