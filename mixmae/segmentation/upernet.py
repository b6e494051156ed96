"""UPerNet: pyramid pooling on the last stage, a feature pyramid over all, and one classifier of pixels.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (2018); the sizes are those of BEiT's and
Swin's segmentation configs, with the 512 channels that the paper's parameters ask for. Unusual, beside them: every
stage's output has a layer norm (StageNorms), whatever the encoder.

Legend: B images, C channels, N classes, H W pixels, h w the grid of a stage; stage s has strides[s] pixels per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.encoders.base import Encoder
from mixmae.encoders.dense import StageNorms, freeze_final_norm

NormKind = Literal["batch", "group"]
_GROUPS = 32
_CLASSIFIER_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class UPerNetConfig:
    """The head of a segmentation model; the defaults are the paper's."""

    channels: int = 512
    """Width of the pyramid."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """Sides of the grids that the last stage is pooled to."""
    aux_channels: int = 256
    """Width of the auxiliary head, which learns from the stage before the last and is not used afterwards."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss; 0: there is no such head."""
    dropout: float = 0.1
    """Share of channels that are dropped before each classifier."""
    norm: NormKind = "batch"
    """Norm after each convolution. batch: its statistics are of all images of a step, on GPUs over all workers. group:
    of each image alone, so that results do not depend on the number of workers and images of a step."""

    def __post_init__(self) -> None:
        if min(self.channels, self.aux_channels) < 1 or not self.pool_scales or min(self.pool_scales) < 1:
            raise ValueError(
                f"channels, aux_channels and pool_scales must be at least 1, got {self.channels}, {self.aux_channels} "
                f"and {self.pool_scales}"
            )
        if self.aux_weight < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"aux_weight is {self.aux_weight} and dropout {self.dropout}: give 0 or more, and [0, 1)")


class ConvBlock(nn.Sequential):
    """A convolution without bias, a norm, a ReLU: (B, in_channels, h, w) -> (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, *, kernel: int, norm: NormKind) -> None:
        groups = next(groups for groups in range(min(_GROUPS, max(1, channels // 4)), 0, -1) if channels % groups == 0)
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels),
            nn.ReLU(),
        )


class UPerHead(nn.Module):
    """Features of all stages to scores of pixels at the first stage's grid.

    Args: stage_channels: width of each stage, two or more.  num_classes: N.
    """

    def __init__(self, stage_channels: Sequence[int], num_classes: int, config: UPerNetConfig) -> None:
        super().__init__()
        *lower, last = stage_channels
        width, norm = config.channels, config.norm
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(last, width, kernel=1, norm=norm))
            for scale in config.pool_scales
        )
        self.bottleneck = ConvBlock(last + len(self.pools) * width, width, kernel=3, norm=norm)
        self.laterals = nn.ModuleList(ConvBlock(channels, width, kernel=1, norm=norm) for channels in lower)
        self.smooth = nn.ModuleList(ConvBlock(width, width, kernel=3, norm=norm) for _ in lower)
        self.fuse = ConvBlock(len(stage_channels) * width, width, kernel=3, norm=norm)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = _classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Args: features: (B, stage_channels[s], h, w) of each stage.   Returns: (B, N, h, w) of the first stage."""
        *lower, last = features
        pooled = [last, *(resized(pool(last), last.shape[-2:]) for pool in self.pools)]
        levels = [self.bottleneck(torch.cat(pooled, dim=1))]
        for feature, lateral in zip(reversed(lower), reversed(self.laterals), strict=True):
            levels.insert(0, lateral(feature) + resized(levels[0], feature.shape[-2:]))
        size = levels[0].shape[-2:]
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        whole = torch.cat([resized(level, size) for level in (*smoothed, levels[-1])], dim=1)
        return self.classifier(self.dropout(self.fuse(whole)))


class FCNHead(nn.Module):
    """One convolution and a classifier, on one stage: the auxiliary head."""

    def __init__(self, in_channels: int, num_classes: int, config: UPerNetConfig) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels, config.aux_channels, kernel=3, norm=config.norm)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = _classifier(config.aux_channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, N, h, w)."""
        return self.classifier(self.dropout(self.conv(feature)))


class UPerNet(nn.Module):
    """An encoder with a UPerNet on its stages.

    Args: encoder: of at least two stages.  num_classes: N, at least 1.
    Raises: ValueError for an encoder of one stage.
    """

    def __init__(self, encoder: Encoder, num_classes: int, config: UPerNetConfig) -> None:
        super().__init__()
        if len(encoder.channels) < 2:
            raise ValueError(
                f"a UPerNet needs an encoder of at least two stages, and {type(encoder).__name__} has one: choose a "
                "Swin, PVT, Twins or ResNetV2."
            )
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        freeze_final_norm(encoder)
        self.encoder = encoder
        self.num_classes = num_classes
        self.norms = StageNorms(encoder.channels)
        self.head = UPerHead(encoder.channels, num_classes, config)
        self.auxiliary = FCNHead(encoder.channels[-2], num_classes, config) if config.aux_weight else None

    def forward(self, images: Tensor, with_auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Score the classes of pixels.

        Args: images: (B, C, H, W) normalised; H and W multiples of the encoder's last stride.
        Returns: (B, N, h, w), h = H / strides[0]; resize them to H x W. With the auxiliary head's as well, if asked.
        """
        features = self.norms(self.encoder.features(images))
        scores = self.head(features)
        if not with_auxiliary:
            return scores
        return scores, None if self.auxiliary is None else self.auxiliary(features[-2])


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, h, w) to another grid, bilinear, pixels taken as areas."""
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """One linear layer for every pixel, which scores all classes nearly alike at first."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=_CLASSIFIER_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
