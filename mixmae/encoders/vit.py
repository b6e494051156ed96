"""The plain vision transformer: one stage, in which all tokens attend to all others (of their group).

It is the encoder of MAE, with the parameter names of MAE and timm.
Unusual, beside MAE: no class token unless asked for, since it would attend to every group; attention can be restricted
to groups.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of tokens, L = H*W, n tokens that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmae.encoders.base import BaseConfig, GroupIsolation, TokenFill, check_inputs, fill_tokens
from mixmae.layers.blocks import SelfAttention, TransformerBlock, group_attn_mask
from mixmae.layers.drop_path import drop_path_rates
from mixmae.layers.initialisation import TABLE_STD, init_projections
from mixmae.layers.patch_embed import PatchEmbed
from mixmae.layers.positions import positions_on_grid, sin_cos_positions
from mixmae.mixing import cell_grid, upsample_group_map

NORM_EPS = 1e-6
"""Added to the variance by every norm; value of MAE and timm."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BaseConfig):
    """The architecture of a ViTEncoder. Functions such as vit_base() give the known sizes."""

    patch_px: int = 16
    """Side of a patch in pixels; it divides the sides of the image."""
    embed_dim: int = 768
    """Width; a multiple of 4 and of num_heads."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its width."""
    class_token: bool = False
    """Add a token without a position, as MAE does. It attends to every token, so group maps are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_px < 1:
            raise ValueError(f"patch_px must be at least 1, got {self.patch_px}; use for example 16")
        if self.depth < 1 or self.num_heads < 1:
            raise ValueError(f"depth and num_heads must be at least 1, got {self.depth} and {self.num_heads}")
        if self.embed_dim < 4 or self.embed_dim % 4 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of num_heads, got {self.embed_dim} and {self.num_heads}"
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token along a side, in the only stage."""
        return (self.patch_px,)

    @property
    def cell_px(self) -> int:
        """Side in pixels of a mask cell, unless the objective sets another: 2 patches, 32 px for those of 16."""
        return 2 * self.patch_px


class ViTEncoder(nn.Module):
    """The plain ViT as an Encoder and a SequenceEncoder (see base.py).

    Group isolation is exact without a class token: a pair of tokens of different groups gets a weight of exactly zero.
    With one it is "none", and a group map is refused.
    Args: config: the architecture.
    Source: MAE; agrees with timm's numbers (tests). Positions are fixed, and the class token's is zero, as in MAE.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_sides
        self.in_channels = config.in_channels
        self.channels: tuple[int, ...] = (config.embed_dim,)
        self.strides = config.strides
        self.cell_px = config.cell_px
        self.fill_dim = config.embed_dim
        self.num_blocks = config.depth
        self.group_isolation: GroupIsolation = "none" if config.class_token else "exact"
        self._table_grid = cell_grid(*self.image_size, config.patch_px)

        self.patch_embed = PatchEmbed(config.in_channels, config.embed_dim, config.patch_px, norm=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim)) if config.class_token else None
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sin_cos_positions(config.embed_dim, self._table_grid)[None])  # (1, L, C)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.embed_dim,
                SelfAttention(config.embed_dim, config.num_heads),
                mlp_ratio=config.mlp_ratio,
                drop_path=rate,
                norm_eps=NORM_EPS,
            )
            for rate in drop_path_rates(config.drop_path, [config.depth])[0]
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        init_projections(self)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=TABLE_STD)

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute the normalised tokens, (B, L, C). See Encoder.forward."""
        return self.final(self.features(images, group_map, fill)[-1])

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of the only stage, (B, C, H, W), not normalised. See Encoder.features."""
        if group_map is not None and self.cls_token is not None:
            raise ValueError("a class token attends to every group: set class_token=False to use a group map")
        x, grid = self._embed(images, group_map, fill), self._grid(images)
        attn_mask = None if group_map is None else group_attn_mask(upsample_group_map(group_map, grid))
        return [self._run_blocks(x, attn_mask).transpose(1, 2).unflatten(2, grid)]

    def final(self, feature: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Normalise each token: (B, C, H, W) to (B, L, C). See Encoder.final."""
        return self.norm(feature.flatten(2).transpose(1, 2))

    def encode_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode n tokens of each image alone, (B, n, C). See SequenceEncoder.encode_visible."""
        x = self._embed(images, None, None)
        if visible.ndim != 2 or len(visible) != len(x):
            raise ValueError(f"visible must be ({len(x)}, n), one row per image, got a shape of {tuple(visible.shape)}")
        x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))  # (B, n, C)
        return self.norm(self._run_blocks(x, None))

    def _embed(self, images: Tensor, group_map: Tensor | None, fill: TokenFill | None) -> Tensor:
        """Check the inputs, embed the patches and add their positions: (B, L, C)."""
        check_inputs(images, group_map, in_channels=self.in_channels, stride=self.config.patch_px)
        x = fill_tokens(self.patch_embed(images), fill).flatten(1, 2)
        return x + positions_on_grid(self.pos_embed, self._table_grid, self._grid(images))

    def _run_blocks(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Run tokens through all blocks, with the class token if there is one: (B, n, C) to (B, n, C)."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, attn_mask)
        return x if self.cls_token is None else x[:, 1:]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.config.patch_px, images.shape[3] // self.config.patch_px

    def parameter_depths(self) -> dict[str, int]:
        """Give the depth of every parameter. See Encoder.parameter_depths."""
        depths = {"cls_token": 0, "patch_embed": 0, "norm": self.num_blocks}
        parts = {name: name.split(".") for name, _ in self.named_parameters()}  # blocks.BLOCK... or one of the above
        return {name: int(part[1]) + 1 if part[0] == "blocks" else depths[part[0]] for name, part in parts.items()}


def vit_tiny() -> ViTConfig:
    """5.5 M parameters. Not in the paper."""
    return ViTConfig(embed_dim=192, depth=12, num_heads=3)


def vit_small() -> ViTConfig:
    """22 M parameters. Not in the paper."""
    return ViTConfig(embed_dim=384, depth=12, num_heads=6)


def vit_base() -> ViTConfig:
    """ViT-B/16: 86 M parameters."""
    return ViTConfig(embed_dim=768, depth=12, num_heads=12)


def vit_large() -> ViTConfig:
    """ViT-L/16: 303 M parameters."""
    return ViTConfig(embed_dim=1024, depth=24, num_heads=16)


def vit_huge() -> ViTConfig:
    """ViT-H/16: 631 M parameters. MAE's has patches of 14 px: patch_px=14."""
    return ViTConfig(embed_dim=1280, depth=32, num_heads=16)


SIZES = (vit_tiny, vit_small, vit_base, vit_large, vit_huge)
