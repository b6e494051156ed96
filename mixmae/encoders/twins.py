"""Twins: PCPVT and SVT, pyramids whose positions come from a convolution (Twins-SVT-L is in Table 3 of the paper).

PCPVT is PVT v1 with a PEG in each stage instead of position tables. In SVT every other block attends in windows.
Unusual, beside the published models: attention and the PEG can be restricted to groups; where windows do not
divide a grid, padding is never read (the published default reads it as zeros; at multiples of 224 px there is none); a
window larger than the grid shrinks to it.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of a stage (tensors are (B, H, W, C) inside stages),
h w the grid of mask cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mixmae.encoders.base import TokenFill, fill_tokens
from mixmae.encoders.pyramid import NORM_EPS, PyramidConfig, PyramidEncoder
from mixmae.layers.blocks import TransformerBlock, group_attn_mask
from mixmae.layers.drop_path import drop_path_rates
from mixmae.layers.group_conv import group_conv2d
from mixmae.layers.patch_embed import PatchEmbed
from mixmae.layers.spatial_reduction import SpatialReductionAttention
from mixmae.layers.windows import WindowAttention, plan_windows
from mixmae.mixing import upsample_group_map


@dataclass(frozen=True, kw_only=True)
class TwinsConfig(PyramidConfig):
    """The architecture of a TwinsEncoder. Functions such as twins_svt_large() give the known sizes."""

    window_sizes: tuple[int, ...] | None = None
    """Side of the windows of each stage, in tokens, for the first, third, ... block of a stage (SVT); None = all blocks
    attend to the reduced keys of the whole image (PCPVT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_sizes is not None:
            self.check_stages("window_sizes")


class PositionConv(nn.Module):
    """PEG: add to each token a depthwise 3 x 3 convolution of its neighbours, by groups.

    It tells tokens where they are, because the border of the grid reads as zeros.
    Source: Chu et al. 2021, conditional positional encodings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  groups: (M, H, W).  Returns: (B, H, W, C)."""
        return x + group_conv2d(x.permute(0, 3, 1, 2), self.proj, groups).permute(0, 2, 3, 1)


class TwinsStage(nn.Module):
    """Patch embedding and blocks, with a PEG after the first one.

    Args: config: the whole architecture.  stage: its index.  drop_paths: one rate per block.
    """

    def __init__(self, config: TwinsConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        dim, num_heads, self.sr_ratio = config.embed_dims[stage], config.num_heads[stage], config.sr_ratios[stage]
        self.window = None if config.window_sizes is None else config.window_sizes[stage]
        self.patch_embed = PatchEmbed(config.input_dims[stage], dim, config.patch_sides[stage])
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                WindowAttention(dim, num_heads, None)
                if self.is_local(index)
                else SpatialReductionAttention(dim, num_heads, self.sr_ratio),
                mlp_ratio=config.mlp_ratios[stage],
                drop_path=rate,
                norm_eps=NORM_EPS,
            )
            for index, rate in enumerate(drop_paths)
        )
        self.peg = PositionConv(dim)

    def is_local(self, index: int) -> bool:
        """Whether a block of this stage, by its index, attends in windows."""
        return self.window is not None and index % 2 == 0

    def forward(self, x: Tensor, group_map: Tensor | None, fill: TokenFill | None) -> Tensor:
        """Args: x: (B, C', H', W') of the stage before, or the images.  group_map: (M, h, w) or None.  fill: or None.

        Returns: (B, C, H, W), not normalised.
        """
        x = fill_tokens(self.patch_embed(x), fill)
        size = (x.shape[1], x.shape[2])
        groups = None if group_map is None else upsample_group_map(group_map, size)
        windows = None if self.window is None else plan_windows(size, self.window, groups, device=x.device)
        attn_mask = group_attn_mask(groups, self.sr_ratio)
        for index, block in enumerate(self.blocks):
            x = block(x, windows if self.is_local(index) else attn_mask)
            if index == 0:
                x = self.peg(x, groups)
        return x.permute(0, 3, 1, 2)


class TwinsEncoder(PyramidEncoder):
    """Twins as an Encoder (see base.py). Group isolation is exact.

    Args: config: the architecture.
    Source: Twins (Chu et al. 2021); agrees with timm's numbers (tests). Weights begin as those of the paper's
        Swin, not as published.
    """

    def __init__(self, config: TwinsConfig) -> None:
        rates = drop_path_rates(config.drop_path, config.depths)
        stages = (TwinsStage(config, stage, rates[stage]) for stage in range(len(config.depths)))
        super().__init__(config, stages, nn.LayerNorm(config.embed_dims[-1], eps=NORM_EPS))


def twins_pcpvt_small() -> TwinsConfig:
    """Twins-PCPVT-S: 23.6 M parameters, 3.8 GMACs at 224 px. PCPVT is not in the paper."""
    return TwinsConfig(depths=(3, 4, 6, 3))


def twins_pcpvt_base() -> TwinsConfig:
    """Twins-PCPVT-B: 43.3 M parameters, 6.7 GMACs at 224 px."""
    return TwinsConfig(depths=(3, 4, 18, 3))


def twins_pcpvt_large() -> TwinsConfig:
    """Twins-PCPVT-L: 60.5 M parameters, 9.8 GMACs at 224 px."""
    return TwinsConfig(depths=(3, 8, 27, 3))


def twins_svt_small() -> TwinsConfig:
    """Twins-SVT-S: 23.5 M parameters, 2.9 GMACs at 224 px. Not in the paper."""
    return _svt(64, depths=(2, 2, 10, 4))


def twins_svt_base() -> TwinsConfig:
    """Twins-SVT-B: 55.3 M parameters, 8.6 GMACs at 224 px. Not in the paper."""
    return _svt(96, depths=(2, 2, 18, 2))


def twins_svt_large() -> TwinsConfig:
    """Twins-SVT-L of the paper's Table 3: 98.2 M parameters, 15.1 GMACs at 224 px."""
    return _svt(128, depths=(2, 2, 18, 2))


def _svt(embed_dim: int, depths: tuple[int, ...]) -> TwinsConfig:
    """Double the width from stage to stage, with heads of 32 channels and windows of 7."""
    dims = tuple(embed_dim * 2**stage for stage in range(len(depths)))
    return TwinsConfig(
        embed_dims=dims,
        depths=depths,
        num_heads=tuple(dim // 32 for dim in dims),
        mlp_ratios=(4.0, 4.0, 4.0, 4.0),
        window_sizes=(7, 7, 7, 7),
    )


SIZES = (twins_pcpvt_small, twins_pcpvt_base, twins_pcpvt_large, twins_svt_small, twins_svt_base, twins_svt_large)
