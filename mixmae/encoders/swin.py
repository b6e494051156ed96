"""Swin with large windows and no shifts: the paper's main encoder (section 3.2, "Hierarchical Vision Transformer").

Unusual, beside Swin: windows are not shifted (14 x 14 is the whole grid of stage 3 at 224 px); fixed sin-cos positions
are added after the patch embedding, besides the relative bias in each window; attention can be restricted to groups;
the downsampling after a stage belongs to the next stage, as in timm. Swin itself, with shifted windows of 7 x 7, is
swin_base_w7().

Legend: B samples, M group maps (B or 1), C channels, H W the grid of tokens of a stage (tensors are (B, H, W, C)
throughout), h w the grid of mask cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from mixmae.encoders.base import (
    GroupIsolation,
    MixEmbedding,
    StagesConfig,
    TokenFill,
    add_mix_embedding,
    check_inputs,
    fill_tokens,
    stage_depths,
)
from mixmae.layers.blocks import TransformerBlock
from mixmae.layers.drop_path import drop_path_rates
from mixmae.layers.initialisation import init_projections
from mixmae.layers.patch_embed import PatchEmbed
from mixmae.layers.positions import positions_on_grid, sin_cos_positions
from mixmae.layers.windows import WindowAttention, plan_sorted, plan_windows
from mixmae.mixing import cell_grid, group_sizes, upsample_group_map

WIDE_STAGE = 2
"""The stage that may have blocks with wide windows."""


@dataclass(frozen=True, kw_only=True)
class SwinConfig(StagesConfig):
    """The architecture of a SwinEncoder. Functions such as swin_base() give the known sizes."""

    embed_dim: int = 128
    """Width of the first stage; each stage doubles it."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads in each stage."""
    window_sizes: tuple[int, ...] = (14, 14, 14, 7)
    """Side of the attention windows of each stage, in tokens; a window larger than the grid shrinks to it."""
    wide_blocks: tuple[int, ...] = ()
    """Blocks of the third stage, counted from 1, that have windows of `wide_window` instead: for dense tasks."""
    wide_window: int = 32
    """Side of the windows of `wide_blocks`, in tokens."""
    shift: bool = False
    """Shift the windows of every second block of a stage by half, where the grid has more than one window."""
    absolute_positions: bool = True
    """Add fixed sin-cos positions after the patch embedding; Swin itself has none."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages("num_heads", "window_sizes")
        if self.embed_dim < 4 or self.embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for the position table, got {self.embed_dim}")
        self.check_heads("embed_dim", self.channels, self.num_heads)
        if self.wide_window < 1:
            raise ValueError(f"wide_window must be at least 1, got {self.wide_window}")
        third = self.depths[WIDE_STAGE] if len(self.depths) > WIDE_STAGE else 0
        if any(not 1 <= block <= third for block in self.wide_blocks):
            raise ValueError(f"wide_blocks names blocks of the third stage, which has {third}; got {self.wide_blocks}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    def block_windows(self, stage: int) -> tuple[int, ...]:
        """Side of the windows of each block of a stage."""
        wide = self.wide_blocks if stage == WIDE_STAGE else ()
        usual = self.window_sizes[stage]
        return tuple(self.wide_window if block + 1 in wide else usual for block in range(self.depths[stage]))


class PatchMerging(nn.Module):
    """Halve the grid: join 2 x 2 tokens and project them to twice the width.

    The four tokens that merge lie in one mask cell, and the norm is over a token's channels: no group map is needed.
    Source: Swin; the four neighbours are joined column by column (upper left, lower left, upper right, lower right).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge (B, H, W, C) to (B, H / 2, W / 2, 2C)."""
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * dim)))


class SwinStage(nn.Module):
    """Blocks at one resolution, after the downsampling that leads to it."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        windows: tuple[int, ...],
        shift: bool,
        mlp_ratio: float,
        drop_paths: list[float],
        downsample: bool,
    ) -> None:
        super().__init__()
        # (side of the window, whether it is shifted) of each block; the first of a stage never is.
        self.cuts = tuple((window, shift and index % 2 == 1) for index, window in enumerate(windows))
        self.downsample = PatchMerging(dim // 2) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, WindowAttention(dim, num_heads, window), mlp_ratio=mlp_ratio, drop_path=rate)
            for window, rate in zip(windows, drop_paths, strict=True)
        )

    def forward(
        self,
        x: Tensor,
        group_map: Tensor | None,
        embedding: MixEmbedding | None,
        index: int,
        sizes: Sequence[int] = (),
    ) -> Tensor:
        """Args: x: (B, H', W', C') of the stage before.  group_map: (M, h, w) or None.  index: of the stage.
        sizes: cells of the groups, as of mixing.group_sizes; empty: they are not sorted by.

        Returns: (B, H, W, C).
        """
        x = add_mix_embedding(self.downsample(x), embedding, index)
        size = (x.shape[1], x.shape[2])
        groups = None if group_map is None else upsample_group_map(group_map, size)
        cuts = [(window, shifted and window < max(size)) for window, shifted in self.cuts]
        by_group = None
        if group_map is not None and groups is not None and set(cuts) == {(cuts[0][0], False)}:
            tokens_per_cell = groups[0].numel() // group_map[0].numel()
            by_group = plan_sorted(groups, [cells * tokens_per_cell for cells in sizes], cuts[0][0])
        if by_group is not None:
            x = by_group.sort(x)
            for block in self.blocks:
                x = block(x, by_group)
            return by_group.unsort(x)
        plans = {cut: plan_windows(size, cut[0], groups, device=x.device, shifted=cut[1]) for cut in set(cuts)}
        for block, cut in zip(self.blocks, cuts, strict=True):
            x = block(x, plans[cut])
        return x


class SwinEncoder(nn.Module):
    """Swin as an Encoder (see base.py).

    Group isolation is exact: with a group map no feature depends on a pixel of another group, at any stage.
    Args: config: the architecture.
    Source: paper section 3.2; sizes and details as in the official code, which golden/ pins.
    """

    group_isolation: GroupIsolation = "exact"
    takes_mix_embedding: Literal[True] = True
    sorts_by_group: Literal[True] = True

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_sides
        self.in_channels = config.in_channels
        self.channels = config.channels
        self.strides = config.strides
        self.cell_px = config.cell_px
        self.fill_dim = config.embed_dim
        self.num_blocks = sum(config.depths)
        cell_grid(*self.image_size, self.strides[-1])
        self._table_grid = cell_grid(*self.image_size, config.patch_px)

        self.patch_embed = PatchEmbed(config.in_channels, config.embed_dim, config.patch_px)
        self.pos_embed: Tensor
        if config.absolute_positions:
            table = sin_cos_positions(config.embed_dim, self._table_grid)[None]  # (1, H*W, C)
            self.register_buffer("pos_embed", table)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList(
            SwinStage(
                dim=self.channels[stage],
                num_heads=config.num_heads[stage],
                windows=config.block_windows(stage),
                shift=config.shift,
                mlp_ratio=config.mlp_ratio,
                drop_paths=rates[stage],
                downsample=stage > 0,
            )
            for stage in range(len(config.depths))
        )
        self.norm = nn.LayerNorm(self.channels[-1])
        init_projections(self)

    def forward(
        self,
        images: Tensor,
        group_map: Tensor | None = None,
        fill: TokenFill | None = None,
        embedding: MixEmbedding | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the normalised tokens of the last stage, (B, L, channels[-1]). See MixEmbeddingEncoder."""
        return self.final(self.features(images, group_map, fill, embedding, sizes)[-1])

    def features(
        self,
        images: Tensor,
        group_map: Tensor | None = None,
        fill: TokenFill | None = None,
        embedding: MixEmbedding | None = None,
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Compute the output of each stage, (B, channels[s], H, W), not normalised. See Encoder.features.

        Args:
            embedding: vectors to add at the start of each stage, with or without a group map.
            sizes: mixing.group_sizes of the map, from when it was still on the CPU; None: they are counted here.
        """
        check_inputs(images, group_map, in_channels=self.in_channels, stride=self.strides[-1])
        if sizes is None:
            sizes = () if group_map is None or group_map.is_meta else group_sizes(group_map)
        x = fill_tokens(self.patch_embed(images), fill)
        if self.config.absolute_positions:
            x = x + self.positions((x.shape[1], x.shape[2]))
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x, group_map, embedding, index, sizes)
            outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def final(self, feature: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Normalise each token of the last stage: (B, C, H, W) to (B, L, C). See Encoder.final."""
        return self.norm(feature.permute(0, 2, 3, 1)).flatten(1, 2)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Give the position table for a grid of tokens: the stored one where it fits, else it resized.

        Returns: (1, H, W, C), dtype and device of the stored table.
        """
        return positions_on_grid(self.pos_embed, self._table_grid, grid).view(1, *grid, -1)

    def parameter_depths(self) -> dict[str, int]:
        """Give the depth of every parameter. See Encoder.parameter_depths and stage_depths."""
        return stage_depths(self, self.config.depths)


def swin_tiny() -> SwinConfig:
    """29 M parameters: Swin-T's widths and depths. Not in the paper."""
    return SwinConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))


def swin_small() -> SwinConfig:
    """50 M parameters: Swin-S's widths and depths. Not in the paper."""
    return SwinConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))


def swin_base() -> SwinConfig:
    """Swin-B/W14 of the paper: 88 M parameters, 16.4 GMACs at 224 px."""
    return SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))


def swin_large() -> SwinConfig:
    """Swin-L/W14 of the paper: 197 M parameters, 35.9 GMACs at 224 px."""
    return SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))


def swin_huge() -> SwinConfig:
    """Swin-H/W14 of the paper: 659 M parameters, 117.7 GMACs at 224 px."""
    return SwinConfig(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88))


def swin_base_w7() -> SwinConfig:
    """Swin-B of the paper's Table 2, with shifted windows: 87 M parameters, 15.5 GMACs at 224 px.

    The paper prints 15.6, and does not mention whether this one has the position table; here it has, like the others.
    Swin's published weights need absolute_positions=False.
    """
    return replace(swin_base(), window_sizes=(7, 7, 7, 7), shift=True)


def swin_large_w7() -> SwinConfig:
    """Swin-L with the shifted windows of swin_base_w7: 195 M parameters, 34.5 GMACs at 224 px."""
    return replace(swin_large(), window_sizes=(7, 7, 7, 7), shift=True)


def with_dense_windows(config: SwinConfig) -> SwinConfig:
    """Give a Swin's windows for detection and segmentation, which let a few blocks see further than the others.

    Windows are of 16 in all stages, and of 32 in every third part's last block of the third stage: the 6th, 12th and
    18th of Swin-B and L. An input of 1024 px then needs no padding.

    Raises: ValueError for fewer than three stages.
    Source: paper section 4. It does not name the last stage; 16 there too is what its computation (701 G) needs.
    """
    if len(config.depths) <= WIDE_STAGE:
        raise ValueError(f"wide windows are for the third stage, and depths has {len(config.depths)}")
    wide = tuple(sorted({config.depths[WIDE_STAGE] * third // 3 for third in (1, 2, 3)} - {0}))
    return replace(config, window_sizes=(16,) * len(config.depths), wide_blocks=wide, wide_window=32)


SIZES = (swin_tiny, swin_small, swin_base, swin_large, swin_huge, swin_base_w7, swin_large_w7)
