"""The architecture of weights in our names, read off their names and shapes.

Legend: w the side of a window in tokens, L tokens, C channels, H W a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, TypeVar

from torch import Tensor

from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import SIZES, EncoderConfig, size_name
from mixmae.encoders.pvt import PvtConfig
from mixmae.encoders.resnetv2 import ResNetV2Config
from mixmae.encoders.swin import SwinConfig
from mixmae.encoders.twins import TwinsConfig
from mixmae.encoders.vit import ViTConfig

StateDict = dict[str, Tensor]
ImageSize = int | tuple[int, int]

BIAS_TABLE = "relative_position_bias_table"

DECODER_NUM_HEADS = {512: 16}
"""Number of heads of the official decoder by its width (one size is released): not visible in shapes."""

DEFAULT_PX = 224
"""Input size assumed for weights without a position table."""

FIRST_CONVS = (
    "encoder.patch_embed.proj.weight",
    "encoder.stages.0.patch_embed.proj.weight",
    "encoder.stem.conv.weight",
)
"""Names of the weights that read pixels, one of which every encoder has."""

PLAIN_SWIN: dict[str, Any] = {"shift": True, "absolute_positions": False}
"""Fields of SwinConfig in which a Swin of Microsoft, timm or SimMIM differs from the paper's."""

_Config = TypeVar("_Config", PvtConfig, TwinsConfig, ViTConfig)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The models that weights belong to."""

    encoder: EncoderConfig
    decoder: DecoderConfig | None
    """The pixel decoder of MixMAE or MAE, if any."""
    num_classes: int | None
    """None without a classifier."""


def read_architecture(
    state: Mapping[str, Tensor],
    image_size: ImageSize | None = None,
    decoder_num_heads: int | None = None,
) -> Architecture:
    """Read the architecture of weights off their shapes.

    Args:
        state: a method, an ImageClassifier or an encoder alone, in our names (encoder.*).
        image_size: side, or (height, width), in pixels; default the square that the position table was made for. For
            another size the table is resized when it is loaded.
        decoder_num_heads: needed unless the decoder has the released width of 512; not visible in shapes.
    Returns: configs to build the models from. Fields that weights do not contain (drop path) keep their defaults; a
        ViT, PVT or Twins gets the number of heads (and the windows) of the known size with the same width.
    Raises: ValueError if shapes do not determine the architecture, the input is not square and image_size is not given,
        or the number of the decoder's heads is not known.
    """
    encoder = encoder_config(state, image_size)
    has_decoder = "decoder.embed.weight" in state
    return Architecture(
        encoder=encoder,
        decoder=pixel_decoder_config(state, encoder, decoder_num_heads) if has_decoder else None,
        num_classes=num_classes(state),
    )


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the linear head; None without a head."""
    return state["head.weight"].shape[0] if "head.weight" in state else None


def kind_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the kind of encoder, a key of READERS, by the names of its weights; None if they are not an encoder's."""
    if f"encoder.stages.0.blocks.0.attn.{BIAS_TABLE}" in state:
        return "Swin"
    if "encoder.blocks.0.attn.qkv.weight" in state:
        return "ViT"
    if "encoder.stem.conv.weight" in state:
        return "ResNet v2"
    if "encoder.stages.0.peg.proj.weight" in state:
        return "Twins"
    if "encoder.stages.0.blocks.0.mlp.dwconv.weight" in state:
        return "PVT v2"
    return "PVT" if "encoder.stages.0.pos_embed" in state else None


def encoder_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> EncoderConfig:
    """Read the config of an encoder off its weights; arguments and errors as in read_architecture."""
    kind = kind_of(state)
    if kind is None:
        raise ValueError("their names are not those of a known encoder")
    try:
        return READERS[kind](state, image_size)
    except KeyError as error:
        raise ValueError(f"{error.args[0]}, which every {kind} has, is missing") from error


def swin_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> SwinConfig:
    """Read the config of a SwinEncoder.

    Without a position table it is a plain Swin with shifted windows (shifts are not visible in shapes).
    """
    tables = [f"{stage}blocks.0.attn.{BIAS_TABLE}" for stage in _stages(state)]
    plain = "encoder.pos_embed" not in state
    embed_dim, in_channels, patch_px, _ = state["encoder.patch_embed.proj.weight"].shape
    if image_size is None:
        image_size = DEFAULT_PX if plain else _square_side(state["encoder.pos_embed"]) * patch_px
    return SwinConfig(
        image_size=image_size,
        in_channels=in_channels,
        patch_px=patch_px,
        embed_dim=embed_dim,
        depths=_depths(state),
        num_heads=tuple(state[table].shape[1] for table in tables),
        window_sizes=tuple(window_size(table, state[table]) for table in tables),
        mlp_ratio=_mlp_ratio(state["encoder.stages.0.blocks.0.mlp.fc1.weight"]),
        **(PLAIN_SWIN if plain else {}),
    )


def vit_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> ViTConfig:
    """Read the config of a ViTEncoder."""
    embed_dim, in_channels, patch_px, _ = state["encoder.patch_embed.proj.weight"].shape
    if image_size is None:
        image_size = _square_side(state["encoder.pos_embed"]) * patch_px
    return replace(
        _known_size(ViTConfig, embed_dim=embed_dim),
        image_size=image_size,
        in_channels=in_channels,
        patch_px=patch_px,
        depth=_count_blocks(state, "encoder.blocks."),
        mlp_ratio=_mlp_ratio(state["encoder.blocks.0.mlp.fc1.weight"]),
        class_token="encoder.cls_token" in state,
    )


def pvt_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> PvtConfig:
    """Read the config of a PvtEncoder of either version."""
    table = state.get("encoder.stages.0.pos_embed")  # (1, H, W, C), in v1
    patch_px = state["encoder.stages.0.patch_embed.proj.weight"].shape[-1]
    if table is None:
        patch_px = (patch_px + 1) // 2  # patches of v2 overlap
    elif image_size is None:
        height, width = (side * patch_px for side in table.shape[1:3])
        image_size = height if height == width else (height, width)
    known = _known_size(PvtConfig, embed_dims=_embed_dims(state), version=2 if table is None else 1)
    return replace(known, image_size=image_size or DEFAULT_PX, patch_px=patch_px, **_pyramid_fields(state))


def twins_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> TwinsConfig:
    """Read the config of a TwinsEncoder: an SVT if its first block has window attention."""
    windows = (7,) * len(_stages(state)) if "encoder.stages.0.blocks.0.attn.qkv.weight" in state else None
    known = _known_size(TwinsConfig, embed_dims=_embed_dims(state), window_sizes=windows)
    patch_px = state["encoder.stages.0.patch_embed.proj.weight"].shape[-1]
    return replace(known, image_size=image_size or DEFAULT_PX, patch_px=patch_px, **_pyramid_fields(state))


def resnetv2_config(state: Mapping[str, Tensor], image_size: ImageSize | None = None) -> ResNetV2Config:
    """Read the config of a ResNetV2Encoder; its norms get 32 groups, as all of BiT have."""
    stem_dim, in_channels, *_ = state["encoder.stem.conv.weight"].shape
    return ResNetV2Config(
        image_size=image_size or DEFAULT_PX, in_channels=in_channels, stem_dim=stem_dim, depths=_depths(state)
    )


READERS: dict[str, Callable[[Mapping[str, Tensor], ImageSize | None], EncoderConfig]] = {
    "Swin": swin_config,
    "ViT": vit_config,
    "ResNet v2": resnetv2_config,
    "Twins": twins_config,
    "PVT v2": pvt_config,
    "PVT": pvt_config,
}
"""Functions that read the config of an encoder off its weights, by kind."""


def pixel_decoder_config(
    state: Mapping[str, Tensor], encoder: EncoderConfig, num_heads: int | None = None
) -> DecoderConfig:
    """Read the config of a PixelDecoder on an encoder off its weights; errors as in read_architecture."""
    dim = state["decoder.embed.weight"].shape[0]
    num_heads = num_heads or DECODER_NUM_HEADS.get(dim)
    if num_heads is None:
        raise ValueError(f"shapes do not tell how many heads a decoder of width {dim} has: pass decoder_num_heads")
    num_values = state["decoder.pred.weight"].shape[0]
    patch_px = encoder.strides[-1]
    if num_values != patch_px**2 * encoder.in_channels:
        raise ValueError(
            f"the decoder predicts {num_values} values per token, not {patch_px} x {patch_px} px of "
            f"{encoder.in_channels} channels"
        )
    return DecoderConfig(
        dim=dim,
        depth=_count_blocks(state, "decoder.blocks."),
        num_heads=num_heads,
        mlp_ratio=_mlp_ratio(state["decoder.blocks.0.mlp.fc1.weight"]),
    )


def describe(state: Mapping[str, Tensor]) -> str:
    """Name the architecture of weights in our names, for messages: "a Swin of width 128 with ... blocks"."""
    kind = kind_of(state)
    if kind is None:
        return "an unknown architecture"
    first = next((state[name] for name in FIRST_CONVS if name in state), None)
    width = "" if first is None else f" of width {first.shape[0]}"
    depths = (_count_blocks(state, "encoder.blocks."),) if kind == "ViT" else _depths(state)
    try:
        known = size_name(encoder_config(state, DEFAULT_PX))
    except ValueError:
        known = None
    blocks = "-".join(map(str, depths))
    return f"a {kind}{width} with {blocks} blocks" + (f" ({known})" if known else "")


def window_size(name: str, table: Tensor) -> int:
    """Return the window side w of a bias table, ((2w - 1)**2, N).   Raises: ValueError for another length."""
    side = isqrt(len(table))
    if side * side != len(table) or side % 2 == 0:
        raise ValueError(f"{name} has {len(table)} rows, which is (2w - 1)**2 for no window w")
    return (side + 1) // 2


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _stages(state: Mapping[str, Tensor]) -> list[str]:
    """The beginnings of the names of each stage's weights."""
    return [f"encoder.stages.{stage}." for stage in range(_count_blocks(state, "encoder.stages."))]


def _mlp_ratio(fc1: Tensor) -> float:
    return fc1.shape[0] / fc1.shape[1]


def _depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks of each stage."""
    return tuple(_count_blocks(state, f"{stage}blocks.") for stage in _stages(state))


def _embed_dims(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Widths of the stages of a PVT or Twins."""
    return tuple(state[f"{stage}patch_embed.proj.weight"].shape[0] for stage in _stages(state))


def _pyramid_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a PyramidConfig that shapes determine, except its widths."""
    stages = _stages(state)
    reductions = {name.split("blocks.")[0]: value for name, value in state.items() if name.endswith("attn.sr.weight")}
    return {
        "in_channels": state["encoder.stages.0.patch_embed.proj.weight"].shape[1],
        "depths": _depths(state),
        "mlp_ratios": tuple(_mlp_ratio(state[f"{stage}blocks.0.mlp.fc1.weight"]) for stage in stages),
        "sr_ratios": tuple(reductions[stage].shape[-1] if stage in reductions else 1 for stage in stages),
    }


def _known_size(kind: type[_Config], **values: Any) -> _Config:
    """Find the known size with these values, for fields that shapes do not tell.   Raises: ValueError for none."""
    for size in SIZES.values():
        config = size()
        if isinstance(config, kind) and all(getattr(config, name) == value for name, value in values.items()):
            return config
    widths = values.get("embed_dim") or "-".join(map(str, values["embed_dims"]))
    raise ValueError(
        f"shapes do not tell how many heads a {kind.__name__.removesuffix('Config')} of width {widths} has, and no "
        f"known size is as wide: pass encoder={kind.__name__}(...)"
    )


def _square_side(table: Tensor) -> int:
    """Return the side of the grid of a position table, (1, L, C).   Raises: ValueError if it is not square."""
    side = isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"the position table has {table.shape[1]} tokens, which is not a square: pass image_size")
    return side
