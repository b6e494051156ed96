"""PVT v1 and v2: pyramids whose attention reads spatially reduced keys (PVT-L is in Table 3 of the paper).

Unusual, beside the published models: attention and convolutions can be restricted to groups; v1 has no class token (the
published one enters its last stage for supervised training; here tasks average the final tokens, as the paper's
finetuning does), and its position tables are resized bicubic, not bilinear, for other grids. At the usual reductions
there is one key per token of the last stage. The linear variant of v2 is left out: its keys average over many cells.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of a stage, h w the grid of mask cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.encoders.base import TokenFill, fill_tokens
from mixmae.encoders.pyramid import NORM_EPS, PyramidConfig, PyramidEncoder
from mixmae.layers.blocks import TransformerBlock, group_attn_mask
from mixmae.layers.drop_path import DropPath, drop_path_rates
from mixmae.layers.group_conv import group_conv2d
from mixmae.layers.initialisation import TABLE_STD
from mixmae.layers.patch_embed import PatchEmbed
from mixmae.layers.spatial_reduction import SpatialReductionAttention
from mixmae.mixing import upsample_group_map


@dataclass(frozen=True, kw_only=True)
class PvtConfig(PyramidConfig):
    """The architecture of a PvtEncoder. Functions such as pvt_large() and pvt_v2_b2() give the known sizes."""

    version: Literal[1, 2] = 1
    """1: patches that do not overlap, position tables, one final norm. 2: overlapping patches and a convolution in each
    MLP, which replace the tables, and a norm after each stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version is 1 or 2, got {self.version}")


class PvtStage(nn.Module):
    """A stage of v1: patch embedding, positions, blocks.

    Args: config: the whole architecture.  stage: its index.  drop_paths: one rate per block.
    """

    def __init__(self, config: PvtConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        dim, self.sr_ratio = config.embed_dims[stage], config.sr_ratios[stage]
        self.patch_embed = PatchEmbed(config.input_dims[stage], dim, config.patch_sides[stage])
        self.table_grid = tuple(side // config.strides[stage] for side in config.image_sides)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.table_grid, dim))  # (1, H, W, C)
        nn.init.trunc_normal_(self.pos_embed, std=TABLE_STD)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                SpatialReductionAttention(dim, config.num_heads[stage], self.sr_ratio),
                mlp_ratio=config.mlp_ratios[stage],
                drop_path=rate,
                norm_eps=NORM_EPS,
            )
            for rate in drop_paths
        )

    def forward(self, x: Tensor, group_map: Tensor | None, fill: TokenFill | None) -> Tensor:
        """Args: x: (B, C', H', W') of the stage before, or the images.  group_map: (M, h, w) or None.  fill: or None.

        Returns: (B, C, H, W), not normalised.
        """
        x = fill_tokens(self.patch_embed(x), fill)
        size = (x.shape[1], x.shape[2])
        x = x + self.positions(size)
        groups = None if group_map is None else upsample_group_map(group_map, size)
        attn_mask = group_attn_mask(groups, self.sr_ratio)
        for block in self.blocks:
            x = block(x, attn_mask)
        return x.permute(0, 3, 1, 2)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Give the position table for a grid of tokens: the learned one where it fits, else resized bicubic.

        Returns: (1, H, W, C).
        """
        if grid == self.table_grid:
            return self.pos_embed
        table = self.pos_embed.permute(0, 3, 1, 2)
        return F.interpolate(table, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


class OverlapPatchEmbed(nn.Module):
    """Project overlapping patches to tokens, each from the pixels of its own group, and normalise each token."""

    def __init__(self, in_channels: int, dim: int, patch_px: int) -> None:
        super().__init__()
        # 7 over a stride of 4, 3 over one of 2; a patch of one pixel overlaps none.
        self.proj = nn.Conv2d(in_channels, dim, 2 * patch_px - 1, stride=patch_px, padding=patch_px - 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, group_map: Tensor | None) -> Tensor:
        """Args: x: (B, in_channels, H, W).  group_map: (M, h, w).  Returns: (B, H / patch_px, W / patch_px, C)."""
        groups = None if group_map is None else upsample_group_map(group_map, (x.shape[2], x.shape[3]))
        return self.norm(group_conv2d(x, self.proj, groups).permute(0, 2, 3, 1))


class ConvMlp(nn.Module):
    """An MLP with a depthwise 3 x 3 convolution, by groups, before its GELU: it tells the tokens where they are."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  groups: (M, H, W).  Returns: (B, H, W, C)."""
        hidden = group_conv2d(self.fc1(x).permute(0, 3, 1, 2), self.dwconv, groups)
        return self.fc2(F.gelu(hidden.permute(0, 2, 3, 1)))


class ConvBlock(nn.Module):
    """A pre-norm block whose attention and MLP both read other tokens."""

    def __init__(self, dim: int, num_heads: int, *, sr_ratio: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, attn_mask: Tensor | None, groups: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  attn_mask: see group_attn_mask.  groups: (M, H, W).  Returns: (B, H, W, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), attn_mask))
        return x + self.drop_path(self.mlp(self.norm2(x), groups))


class PvtV2Stage(nn.Module):
    """A stage of v2: overlapping patch embedding, blocks, norm. Arguments as of PvtStage."""

    def __init__(self, config: PvtConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        dim, self.sr_ratio = config.embed_dims[stage], config.sr_ratios[stage]
        self.patch_embed = OverlapPatchEmbed(config.input_dims[stage], dim, config.patch_sides[stage])
        self.blocks = nn.ModuleList(
            ConvBlock(
                dim,
                config.num_heads[stage],
                sr_ratio=self.sr_ratio,
                mlp_ratio=config.mlp_ratios[stage],
                drop_path=rate,
            )
            for rate in drop_paths
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, group_map: Tensor | None, fill: TokenFill | None) -> Tensor:
        """As PvtStage.forward, but normalised."""
        x = fill_tokens(self.patch_embed(x, embedding_groups(group_map, fill)), fill)
        groups = None if group_map is None else upsample_group_map(group_map, (x.shape[1], x.shape[2]))
        attn_mask = group_attn_mask(groups, self.sr_ratio)
        for block in self.blocks:
            x = block(x, attn_mask, groups)
        return self.norm(x).permute(0, 3, 1, 2)


def embedding_groups(group_map: Tensor | None, fill: TokenFill | None) -> Tensor | None:
    """Make the filled cells of each group a group of their own, so that overlapping patches do not read them.

    Args: group_map: (M, h, w) int64 or None.  fill: or None.
    Returns: (B or 1, h, w) int64, or None where there is neither a map nor a fill.
    """
    if fill is None:
        return group_map
    filled = fill.mask.long()
    return filled if group_map is None else 2 * group_map + filled


class PvtEncoder(PyramidEncoder):
    """PVT as an Encoder (see base.py). The features of v2 are normalised: its stages end in norms.

    Group isolation is exact. With a fill, the patches of v2 do not read filled cells.
    Args: config: the architecture.
    Source: PVT (Wang et al. 2021) and PVT v2 (Wang et al. 2022); v2 agrees with timm's numbers (tests). Weights begin
        as those of the paper's Swin, not as published.
    """

    def __init__(self, config: PvtConfig) -> None:
        make = PvtStage if config.version == 1 else PvtV2Stage
        rates = drop_path_rates(config.drop_path, config.depths)
        norm = nn.LayerNorm(config.embed_dims[-1], eps=NORM_EPS) if config.version == 1 else nn.Identity()
        super().__init__(config, (make(config, stage, rates[stage]) for stage in range(len(config.depths))), norm)


def pvt_tiny() -> PvtConfig:
    """PVT-Tiny: 12.7 M parameters, 1.9 GMACs at 224 px."""
    return PvtConfig(depths=(2, 2, 2, 2))


def pvt_small() -> PvtConfig:
    """PVT-Small: 24.0 M parameters, 3.8 GMACs at 224 px."""
    return PvtConfig(depths=(3, 4, 6, 3))


def pvt_medium() -> PvtConfig:
    """PVT-Medium: 43.7 M parameters, 6.7 GMACs at 224 px."""
    return PvtConfig(depths=(3, 4, 18, 3))


def pvt_large() -> PvtConfig:
    """PVT-L of the paper's Table 3: 60.9 M parameters, 9.8 GMACs at 224 px."""
    return PvtConfig(depths=(3, 8, 27, 3))


def pvt_v2_b0() -> PvtConfig:
    """PVT v2-B0: 3.4 M parameters, 0.6 GMACs at 224 px. v2 is not in the paper."""
    return PvtConfig(version=2, embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2))


def pvt_v2_b1() -> PvtConfig:
    """PVT v2-B1: 13.5 M parameters, 2.1 GMACs at 224 px."""
    return PvtConfig(version=2, depths=(2, 2, 2, 2))


def pvt_v2_b2() -> PvtConfig:
    """PVT v2-B2: 24.8 M parameters, 4.0 GMACs at 224 px."""
    return PvtConfig(version=2, depths=(3, 4, 6, 3))


def pvt_v2_b3() -> PvtConfig:
    """PVT v2-B3: 44.7 M parameters, 6.9 GMACs at 224 px."""
    return PvtConfig(version=2, depths=(3, 4, 18, 3))


def pvt_v2_b4() -> PvtConfig:
    """PVT v2-B4: 62.0 M parameters, 10.1 GMACs at 224 px."""
    return PvtConfig(version=2, depths=(3, 8, 27, 3))


def pvt_v2_b5() -> PvtConfig:
    """PVT v2-B5: 81.4 M parameters, 11.8 GMACs at 224 px."""
    return PvtConfig(version=2, depths=(3, 6, 40, 3), mlp_ratios=(4.0, 4.0, 4.0, 4.0))


SIZES = (pvt_tiny, pvt_small, pvt_medium, pvt_large, pvt_v2_b0, pvt_v2_b1, pvt_v2_b2, pvt_v2_b3, pvt_v2_b4, pvt_v2_b5)
