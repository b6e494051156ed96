"""What every encoder promises to the objectives, the finetuning tasks and the optimiser.

Legend: B samples, M group maps (B or 1), C channels, H W pixels, h w the grid of mask cells, L = h*w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mixmae.mixing import upsample_group_map

GroupIsolation = Literal["exact", "partial", "none"]
"""exact: a feature depends on no pixel of another group, at any stage. partial: some leaks, and the encoder's docstring
says how far. none: the encoder cannot take a group map and raises ValueError when given one."""

DepthRule = Literal["official", "timm"]
"""Whose layer decay: see head_depth."""


@dataclass(frozen=True, kw_only=True)
class TokenFill:
    """Mask tokens in the encoder's input, as SimMIM has them: what stands in cells that hold no image."""

    cells: Tensor
    """(B, h, w) or (1, h, w) bool, True = the cell's tokens are replaced."""
    token: Tensor
    """(fill_dim(encoder),), what they are replaced by: a learned mask token, or zeros."""


@dataclass(frozen=True, kw_only=True)
class MixEmbedding:
    """Vectors that tell the groups of a mix apart without keeping them apart (paper section 3.3, "Mix embedding")."""

    group_map: Tensor
    """(M, h, w) int64, one entry a mask cell."""
    vectors: Sequence[Tensor]
    """For each stage s (groups, channels[s]), one vector a group."""


@runtime_checkable
class Encoder(Protocol):
    """A built backbone: a torch module that pretrains with a group map and finetunes without one."""

    image_size: tuple[int, int]
    """(H, W) in pixels that its fixed tables were built for; other multiples of strides[-1] work too."""
    in_channels: int
    """Channels of the images."""
    strides: tuple[int, ...]
    """Pixels a token of each stage covers along a side; each divides the mask unit, and the last is it for pyramids."""
    channels: tuple[int, ...]
    """Width of the features of each stage."""
    num_blocks: int
    """Blocks in all stages: layer decay counts depth in them."""
    group_isolation: GroupIsolation
    """What a group map guarantees."""

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of each stage, not normalised.

        Args:
            images: (B, in_channels, H, W) float, H and W multiples of the mask unit.
            group_map: (M, h, w) int64, one entry a mask cell; None = one image a sample. Filled cells belong to a group
                like any other.
            fill: tokens to replace after the patch embedding (and its norm), before positions are added; None = none.
        Returns: for each stage s (B, channels[s], H / strides[s], W / strides[s]).
        Raises: ValueError for images or maps of other shapes.
        """
        ...

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute the tokens of the last stage after the final norm: (B, L, channels[-1]). Arguments as in features.

        L = (H / strides[-1]) * (W / strides[-1]), in row order.
        """
        ...

    def parameter_depths(self, rule: DepthRule = "official") -> dict[str, int]:
        """Give every parameter, by name, one depth in [0, num_blocks]: 0 the stem, j + 1 the j-th block.

        The learning rate of a parameter is scaled by decay ** (num_blocks + 1 - depth).
        """
        ...

    # An encoder is also an nn.Module; these are the parts of one that its users need.
    def __call__(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]: ...


@runtime_checkable
class MixEmbeddingEncoder(Encoder, Protocol):
    """An encoder that can add mix embeddings at the start of each stage, after the downsampling that leads to it."""

    takes_mix_embedding: Literal[True]

    def __call__(
        self,
        images: Tensor,
        group_map: Tensor | None = None,
        fill: TokenFill | None = None,
        embedding: MixEmbedding | None = None,
    ) -> Tensor: ...


@runtime_checkable
class SequenceEncoder(Encoder, Protocol):
    """An encoder of one stage that can run on a part of its tokens alone, as MAE needs (a plain ViT)."""

    def encode_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode some tokens of each image as if the others did not exist; positions stay those of the whole grid.

        Args:
            images: (B, in_channels, H, W) float.
            visible: (B, n) int64, numbers of the tokens that are kept, in row order of the grid of strides[-1].
        Returns: (B, n, channels[-1]) after the final norm, in the order of visible; a class token takes part and is
            dropped.
        """
        ...


def head_depth(encoder: Encoder, rule: DepthRule) -> int:
    """Give the depth of a task's head on this encoder.

    official: as the last block and the final norm, so that even the head's rate is scaled by decay ** 1.
    timm: one more, so that the head's rate is not scaled.
    Source: the official finetuning code (golden/mixmim_optimization.json); timm's param_groups_layer_decay.
    """
    return encoder.num_blocks if rule == "official" else encoder.num_blocks + 1


def fill_dim(encoder: Encoder) -> int:
    """Give the width of an encoder's embedded patches, which a fill replaces.

    It is channels[0], but for encoders whose first stage widens them: those have a stem_dim.
    """
    return getattr(encoder, "stem_dim", encoder.channels[0])


def fill_tokens(x: Tensor, fill: TokenFill | None) -> Tensor:
    """Replace the tokens of the cells that a fill names.

    Args: x: (B, H, W, C), the embedded patches; H and W are multiples of the fill's grid.  fill: or None for x itself.
    Returns: (B, H, W, C), dtype of x.
    """
    if fill is None:
        return x
    covered = upsample_group_map(fill.cells, (x.shape[1], x.shape[2]))
    return torch.where(covered[..., None], fill.token.to(x.dtype), x)


def add_mix_embedding(x: Tensor, embedding: MixEmbedding | None, stage: int) -> Tensor:
    """Add each token's vector of its group.

    Args: x: (B, H, W, C) at the start of a stage.  embedding: or None for x itself.  stage: number of the stage.
    Returns: (B, H, W, C), dtype of x.
    """
    if embedding is None:
        return x
    groups = upsample_group_map(embedding.group_map, (x.shape[1], x.shape[2]))
    return x + embedding.vectors[stage].to(x.dtype)[groups]


def check_images(images: Tensor, in_channels: int) -> None:
    """Raise ValueError unless images are (B, in_channels, H, W) floats."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise ValueError(f"the encoder takes images of shape (B, {in_channels}, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be normalised floats, got {images.dtype}")
