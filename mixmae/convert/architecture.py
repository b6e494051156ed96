"""What architecture weights in our names belong to, read off their names and shapes.

Legend: I a stage, J a block, w the side of a window, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any

from torch import Tensor

from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import EncoderConfig, size_name
from mixmae.encoders.swin import NUM_STAGES, PATCH_PX, SwinConfig
from mixmae.mixing import MASK_UNIT_PX

StateDict = dict[str, Tensor]

BIAS_TABLE = "relative_position_bias_table"

DECODER_NUM_HEADS = {512: 16}
"""Heads of the official decoder by its width: the one released size. Shapes do not tell heads."""

DEFAULT_PX = 224
"""Input size of weights that have no position table to tell it."""

PLAIN_SWIN: dict[str, Any] = {"shift": True, "absolute_positions": False}
"""How a Swin of Microsoft, timm or SimMIM differs from the paper's, in fields of SwinConfig."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The models that weights belong to."""

    encoder: EncoderConfig
    decoder: DecoderConfig | None
    """The pixel decoder of MixMAE; None where there is none."""
    num_classes: int | None
    """None where there is no classifier."""


def read_architecture(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
) -> Architecture:
    """Read the architecture of weights off their shapes.

    Args:
        state: a MixMAE, an ImageClassifier or an encoder alone, in our names (encoder.*).
        image_size: side, or height and width, in pixels; default the square that the position table was made for. With
            another size the table does not fit, and is resized when it is loaded.
        decoder_num_heads: shapes do not tell the heads of the decoder; needed unless it has the released width of 512.
    Returns: configs to build the models from. Drop path and the like are not in weights and keep their defaults.
    Raises: ValueError if it is no architecture that shapes tell, the size is not given and not square, or the decoder's
        heads are not known.
    """
    return Architecture(
        encoder=swin_config(state, image_size),
        decoder=pixel_decoder_config(state, decoder_num_heads) if "decoder.embed.weight" in state else None,
        num_classes=num_classes(state),
    )


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """Count the classes of the linear head, None where there is none."""
    return state["head.weight"].shape[0] if "head.weight" in state else None


def swin_config(state: Mapping[str, Tensor], image_size: int | tuple[int, int] | None = None) -> SwinConfig:
    """Read the config of a SwinEncoder off its weights; arguments and errors as in read_architecture.

    Weights without a position table are those of a plain, shifted Swin (shapes do not tell shifts).
    """
    tables = [f"encoder.stages.{stage}.blocks.0.attn.{BIAS_TABLE}" for stage in range(NUM_STAGES)]
    first_mlp = "encoder.stages.0.blocks.0.mlp.fc1.weight"
    absent = [name for name in ("encoder.patch_embed.proj.weight", *tables, first_mlp) if name not in state]
    if absent:
        raise ValueError(f"only the config of a Swin can be read off shapes, and {absent[0]} is not there")
    plain = "encoder.pos_embed" not in state
    if plain and not PLAIN_SWIN.keys() <= {field.name for field in fields(SwinConfig)}:
        raise ValueError("these are weights of a Swin with shifted windows, which SwinConfig cannot describe")
    embed_dim, in_channels, *_ = state["encoder.patch_embed.proj.weight"].shape
    if image_size is None and plain:
        image_size = DEFAULT_PX
    elif image_size is None:
        num_tokens = state["encoder.pos_embed"].shape[1]
        image_size = isqrt(num_tokens) * PATCH_PX
        if (image_size // PATCH_PX) ** 2 != num_tokens:
            raise ValueError(f"the position table has {num_tokens} tokens, which is no square: pass image_size")
    return SwinConfig(
        image_size=image_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depths=tuple(_count_blocks(state, f"encoder.stages.{stage}.blocks.") for stage in range(NUM_STAGES)),
        num_heads=tuple(state[table].shape[1] for table in tables),
        window_sizes=tuple(window_size(table, state[table]) for table in tables),
        mlp_ratio=_mlp_ratio(state[first_mlp]),
        **(PLAIN_SWIN if plain else {}),
    )


def pixel_decoder_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> DecoderConfig:
    """Read the config of MixMAE's PixelDecoder off its weights; errors as in read_architecture."""
    dim = state["decoder.embed.weight"].shape[0]
    num_heads = num_heads or DECODER_NUM_HEADS.get(dim)
    if num_heads is None:
        raise ValueError(f"shapes do not tell how many heads a decoder of width {dim} has: pass decoder_num_heads")
    num_values = state["decoder.pred.weight"].shape[0]
    in_channels = state["encoder.patch_embed.proj.weight"].shape[1]
    if num_values != MASK_UNIT_PX**2 * in_channels:
        raise ValueError(
            f"the decoder predicts {num_values} values a cell, not {MASK_UNIT_PX} px of {in_channels} channels"
        )
    return DecoderConfig(
        dim=dim,
        depth=_count_blocks(state, "decoder.blocks."),
        num_heads=num_heads,
        mlp_ratio=_mlp_ratio(state["decoder.blocks.0.mlp.fc1.weight"]),
    )


def describe(state: Mapping[str, Tensor]) -> str:
    """Say in words what encoder weights in our names belong to, for messages: "a Swin of width 128 with ... blocks"."""
    projections = (name for name in state if name.startswith("encoder.") and name.endswith("proj.weight"))
    first = next((state[name] for name in projections if state[name].ndim == 4), None)
    width = "" if first is None else f" of width {first.shape[0]}"
    num_stages = _count_blocks(state, "encoder.stages.")
    if num_stages:
        depths = "-".join(str(_count_blocks(state, f"encoder.stages.{stage}.blocks.")) for stage in range(num_stages))
        kind = "a Swin" if any(name.endswith(BIAS_TABLE) for name in state) else "a pyramid"
        try:
            known = size_name(swin_config(state, DEFAULT_PX))
        except ValueError:
            known = None
        return f"{kind}{width} with {depths} blocks" + (f" ({known})" if known else "")
    if depth := _count_blocks(state, "encoder.blocks."):
        return f"a ViT{width} with {depth} blocks"
    return "an architecture that is not known here"


def window_size(name: str, table: Tensor) -> int:
    """Give the side w of the windows that a table of relative positions is for.   Raises: ValueError for no such."""
    side = isqrt(len(table))
    if side * side != len(table) or side % 2 == 0:
        raise ValueError(f"{name} has {len(table)} rows, which is (2w - 1)**2 for no window w")
    return (side + 1) // 2


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _mlp_ratio(fc1: Tensor) -> float:
    return fc1.shape[0] / fc1.shape[1]
