"""ResNet v2 of BiT, a convolutional encoder (paper section A.3).

Pre-activation bottlenecks with group norms and standardised filters. Under a group map, convolutions and the pooling
read their own group only (mixed partial convolution), and the norms take the statistics of each image alone. Parameter
names are timm's.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of a stage (tensors are (B, C, H, W) throughout),
h w the grid of mask cells, S stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.encoders.base import (
    BaseConfig,
    GroupIsolation,
    TokenFill,
    check_inputs,
    fill_tokens,
    stage_depths,
)
from mixmae.layers.drop_path import DropPath, drop_path_rates
from mixmae.layers.group_conv import group_conv2d, group_max_pool2d
from mixmae.layers.group_norm import MixedGroupNorm
from mixmae.mixing import cell_grid, upsample_group_map

STRIDES = (4, 8, 16, 32)
"""Pixels per token along a side, in each stage."""
EXPANSION = 4
"""Width of a bottleneck's output over that of its inner convolutions."""
WEIGHT_EPS = 1e-8
"""Added to the variance of a filter; value of BiT's weights in timm."""


@dataclass(frozen=True, kw_only=True)
class ResNetV2Config(BaseConfig):
    """The architecture of a ResNetV2Encoder. Functions such as resnetv2_50x3() give the known sizes."""

    stem_dim: int = 192
    """Width of the root, 64 times BiT's width factor of 3; the stages are 4, 8, 16 and 32 times as wide."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Bottlenecks in each of the four stages."""
    num_norm_groups: int = 32
    """Groups of channels of each norm; they divide stem_dim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(STRIDES) or min(self.depths) < 1:
            raise ValueError(f"depths needs {len(STRIDES)} numbers of at least 1, one per stage; got {self.depths}")
        if self.num_norm_groups < 1 or self.stem_dim < 1 or self.stem_dim % self.num_norm_groups:
            raise ValueError(
                f"stem_dim must be a multiple of num_norm_groups, got {self.stem_dim} and {self.num_norm_groups}"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token along a side, in each stage."""
        return STRIDES

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(EXPANSION * self.stem_dim * 2**stage for stage in range(len(STRIDES)))


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose filters have zero mean and unit variance, kept inside groups.

    Source: weight standardisation (Qiao et al. 2019), as in BiT: over all weights of a filter, biased variance.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        # The size of the weights does not change the function, only how fast they turn.
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Args: x: (B, C, H, W).  group_map: (M, h, w) or None.  Returns: (B, out_channels, H / S, W / S)."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (variance + WEIGHT_EPS).rsqrt()
        groups = None
        if group_map is not None and self.kernel_size != (1, 1):  # a kernel of one reads no neighbour
            groups = upsample_group_map(group_map, (x.shape[2], x.shape[3]))
        return group_conv2d(x, self, groups, weight=weight)


class Root(nn.Module):
    """Pixels to the first tokens: a 7 x 7 convolution and a 3 x 3 maximum, each of stride 2."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, dim, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, images: Tensor, group_map: Tensor | None) -> Tensor:
        """Args: images: (B, in_channels, H, W).  group_map: (M, h, w) or None.  Returns: (B, C, H / 4, W / 4)."""
        x = self.conv(images, group_map)
        groups = None if group_map is None else upsample_group_map(group_map, (x.shape[2], x.shape[3]))
        x = group_max_pool2d(x, self.pool, groups)
        # BiT pads with zeros, which take part in the maximum; windows reach over the upper and the left border alone.
        border = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
        border[0] = border[:, 0] = True
        return torch.where(border, x.clamp(min=0.0), x)


class Bottleneck(nn.Module):
    """A pre-activation bottleneck: x + conv3(conv2(conv1(x))), each convolution after a norm and a ReLU.

    The first of a stage has a convolution on the shortcut too, from its normalised input; the stride is conv2's.
    """

    def __init__(self, in_dim: int, dim: int, *, stride: int, norm_groups: int, drop_path: float, first: bool) -> None:
        super().__init__()
        inner = dim // EXPANSION
        self.downsample = nn.ModuleDict({"conv": StdConv2d(in_dim, dim, 1, stride)}) if first else None
        self.norm1 = MixedGroupNorm(norm_groups, in_dim)
        self.conv1 = StdConv2d(in_dim, inner, 1)
        self.norm2 = MixedGroupNorm(norm_groups, inner)
        self.conv2 = StdConv2d(inner, inner, 3, stride)
        self.norm3 = MixedGroupNorm(norm_groups, inner)
        self.conv3 = StdConv2d(inner, dim, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, group_map: Tensor | None) -> Tensor:
        """Args: x: (B, C, H, W).  group_map: (M, h, w) or None.  Returns: (B, dim, H / S, W / S)."""
        normed = F.relu(self.norm1(x, group_map))
        shortcut = x if self.downsample is None else self.downsample["conv"](normed, group_map)
        x = self.conv1(normed, group_map)
        x = self.conv2(F.relu(self.norm2(x, group_map)), group_map)
        x = self.conv3(F.relu(self.norm3(x, group_map)), group_map)
        return shortcut + self.drop_path(x)


class ResNetStage(nn.Module):
    """Bottlenecks at one resolution; the first widens and has the stride."""

    def __init__(self, in_dim: int, dim: int, *, stride: int, norm_groups: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Bottleneck(
                dim if index else in_dim,
                dim,
                stride=1 if index else stride,
                norm_groups=norm_groups,
                drop_path=rate,
                first=index == 0,
            )
            for index, rate in enumerate(drop_paths)
        )

    def forward(self, x: Tensor, group_map: Tensor | None) -> Tensor:
        """Args: x: (B, C, H, W).  group_map: (M, h, w) or None.  Returns: (B, dim, H / S, W / S)."""
        for block in self.blocks:
            x = block(x, group_map)
        return x


class ResNetV2Encoder(nn.Module):
    """BiT's ResNet v2 as an Encoder (see base.py).

    Group isolation is exact. A fill replaces the output of the root, which is stem_dim wide. The windows of the root
    overlap, so it sees filled cells as zeros: none of their pixels leaks into the cells around.
    Args: config: the architecture.
    Source: BiT (Kolesnikov et al. 2020); agrees with timm's numbers (tests). Paper section A.3 for the convolutions.
    """

    group_isolation: GroupIsolation = "exact"

    def __init__(self, config: ResNetV2Config) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_sides
        self.in_channels = config.in_channels
        self.channels: tuple[int, ...] = config.channels
        self.strides = config.strides
        self.cell_px = config.cell_px
        cell_grid(*self.image_size, self.strides[-1])
        self.fill_dim = config.stem_dim
        self.num_blocks = sum(config.depths)

        self.stem = Root(config.in_channels, config.stem_dim)
        widths = (config.stem_dim, *config.channels)
        self.stages = nn.ModuleList(
            ResNetStage(
                widths[stage],
                widths[stage + 1],
                stride=2 if stage else 1,
                norm_groups=config.num_norm_groups,
                drop_paths=rates,
            )
            for stage, rates in enumerate(drop_path_rates(config.drop_path, config.depths))
        )
        self.norm = MixedGroupNorm(config.num_norm_groups, self.channels[-1])

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute the normalised tokens of the last stage, (B, L, channels[-1]). See Encoder.forward."""
        return self.final(self.features(images, group_map, fill)[-1], group_map)

    def final(self, feature: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Apply BiT's last norm and ReLU to the last stage: (B, C, H, W) to (B, L, C). See Encoder.final."""
        return F.relu(self.norm(feature, group_map)).flatten(2).transpose(1, 2)

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of each stage, (B, channels[s], H, W), not normalised. See Encoder.features."""
        check_inputs(images, group_map, in_channels=self.in_channels, stride=self.strides[-1])
        if fill is not None:
            covered = upsample_group_map(fill.mask, (images.shape[2], images.shape[3]))
            images = images.masked_fill(covered[:, None], 0.0)
        x = self.stem(images, group_map)
        x = fill_tokens(x.permute(0, 2, 3, 1), fill).permute(0, 3, 1, 2)
        outputs = []
        for stage in self.stages:
            x = stage(x, group_map)
            outputs.append(x)
        return outputs

    def parameter_depths(self) -> dict[str, int]:
        """Give the depth of every parameter. See Encoder.parameter_depths and stage_depths."""
        return stage_depths(self, self.config.depths)


def resnetv2_50x3() -> ResNetV2Config:
    """BiT's ResNet-50 with three times the width: 211 M parameters."""
    return ResNetV2Config(depths=(3, 4, 6, 3))


def resnetv2_101x3() -> ResNetV2Config:
    """BiT's ResNet-101 with three times the width: 382 M parameters."""
    return ResNetV2Config(depths=(3, 4, 23, 3))


SIZES = (resnetv2_50x3, resnetv2_101x3)
