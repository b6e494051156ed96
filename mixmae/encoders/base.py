"""What every encoder promises to the objectives, the finetuning tasks and the optimiser.

Legend: B samples, M group maps (B or 1), C channels, H W pixels, h w the grid of mask cells, L tokens of the last
stage. `group_map` is int64 (M, h, w), one entry per mask cell; `groups` is the same at the grid of a stage's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mixmae.mixing import cell_grid, check_group_map, upsample_group_map
from mixmae.patches import image_sides

GroupIsolation = Literal["exact", "partial", "none"]
"""exact: a feature depends on no pixel of another group, at any stage. partial: some do, and the encoder's docstring
explains which. none: the encoder cannot take a group map and raises ValueError when given one."""

DepthRule = Literal["official", "timm"]
"""Whose layer decay: see head_depth."""

PATCH_SIDES = (1, 2, 4, 8)
"""Sides that the patches of a Swin, PVT or Twins may have, in pixels."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The fields that the config of every encoder has.   Raises: ValueError for values that make no encoder."""

    image_size: int | tuple[int, int] = 224
    """Side, or height and width, in pixels; multiples of the last stride (32 in the paper). Position tables are built
    for it; other sizes work too."""
    in_channels: int = 3
    """Channels of the images."""
    drop_path: float = 0.0
    """Probability that the branches of the last block are dropped, rising from 0 at the first; 0 for pretraining."""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path is a probability below 1, got {self.drop_path}")

    @property
    def image_sides(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_sides(self.image_size)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token along a side, in each stage."""
        raise NotImplementedError

    @property
    def cell_px(self) -> int:
        """Side in pixels of a mask cell, unless the objective sets another. See Encoder.cell_px."""
        return self.strides[-1]

    def check_heads(self, field: str, widths: Sequence[int], num_heads: Sequence[int]) -> None:
        """Raise ValueError unless every width is a multiple of its number of heads; `field` sets the widths."""
        for width, heads in zip(widths, num_heads, strict=True):
            if width % heads:
                raise ValueError(f"a width of {width} cannot be shared by {heads} heads: change {field} or num_heads")


@dataclass(frozen=True, kw_only=True)
class StagesConfig(BaseConfig):
    """The fields that encoders of several stages have; each stage halves the grid of the one before."""

    patch_px: int = 4
    """Side of a patch in pixels: 4 in the paper; 1, 2 or 8 for small or large images. The strides of the stages are
    patch_px times 1, 2, 4, 8."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks in each stage; two to four stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_px not in PATCH_SIDES:
            raise ValueError(f"patch_px must be one of {', '.join(map(str, PATCH_SIDES))}, got {self.patch_px}")
        if not 2 <= len(self.depths) <= 4:
            raise ValueError(f"depths gives the blocks of two to four stages, got {self.depths}")
        self.check_stages("depths")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token along a side, in each stage."""
        return tuple(self.patch_px * 2**stage for stage in range(len(self.depths)))

    def check_stages(self, *names: str) -> None:
        """Raise ValueError unless each of these fields has a number of at least 1 for every stage of depths."""
        for name in names:
            values = getattr(self, name)
            if len(values) != len(self.depths) or min(values) < 1:
                raise ValueError(
                    f"{name} needs {len(self.depths)} numbers of at least 1, one per stage of depths; got {values}"
                )


@dataclass(frozen=True, kw_only=True)
class TokenFill:
    """Mask tokens in the encoder's input, as in SimMIM, for the cells that show no image."""

    mask: Tensor
    """(B, h, w) or (1, h, w) bool, True = the tokens of the cell are replaced."""
    token: Tensor
    """(encoder.fill_dim,): a learned mask token, or zeros."""


@dataclass(frozen=True, kw_only=True)
class MixEmbedding:
    """Vectors that tell the groups of a mix apart without keeping them apart (paper section 3.3, "Mix embedding")."""

    group_map: Tensor
    """(M, h, w) int64, one entry per mask cell."""
    vectors: Sequence[Tensor]
    """For each stage s (groups, channels[s]), one vector per group."""


@runtime_checkable
class Encoder(Protocol):
    """A built backbone: a torch module that pretrains with a group map and finetunes without one."""

    image_size: tuple[int, int]
    """(H, W) in pixels that its position tables were built for; other multiples of the last stride work too."""
    in_channels: int
    """Channels of the images."""
    strides: tuple[int, ...]
    """Pixels per token along a side, in each stage; each divides the last one."""
    cell_px: int
    """Side in pixels of a mask cell, unless the objective sets another: the last stride, or 2 patches of a ViT. All
    multiples of the last stride work."""
    channels: tuple[int, ...]
    """Width of the features of each stage."""
    fill_dim: int
    """Width of the embedded patches, which a fill replaces."""
    num_blocks: int
    """Blocks in all stages: layer decay counts depth in them."""
    group_isolation: GroupIsolation
    """What a group map guarantees."""

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of each stage, not normalised.

        Args:
            images: (B, in_channels, H, W) float, H and W multiples of the last stride.
            group_map: (M, h, w) int64, one entry per mask cell; None = each sample is one image. Its shape tells the
                size of a cell, a whole number of tokens of the last stage. Filled cells belong to a group like any
                other.
            fill: tokens to replace after the patch embedding (and its norm), before positions are added; None = none.
        Returns: for each stage s (B, channels[s], H / strides[s], W / strides[s]).
        Raises: ValueError for images or a map of other shapes.
        """
        ...

    def final(self, feature: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Turn the last of features() into what heads and decoders take: tokens after the final norm.

        Args: feature: (B, channels[-1], H / strides[-1], W / strides[-1]).  group_map: as given to features.
        Returns: (B, L, channels[-1]), L = (H / strides[-1]) * (W / strides[-1]) tokens in row order.
        """
        ...

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute final(features(...)[-1], group_map): (B, L, channels[-1]). Arguments as in features."""
        ...

    def parameter_depths(self) -> dict[str, int]:
        """Give every parameter, by name, one depth in [0, num_blocks]: 0 for the stem, j + 1 for the j-th block.

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
class SortingEncoder(Encoder, Protocol):
    """An encoder that sorts tokens by group. On a GPU it would wait for the sizes of the groups, if they are not given.

    Its call takes sizes: what mixing.group_sizes found of the map when it was still on the CPU.
    """

    sorts_by_group: Literal[True]


@runtime_checkable
class SequenceEncoder(Encoder, Protocol):
    """An encoder of one stage that can run on a part of its tokens, as MAE needs (a plain ViT)."""

    def encode_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode some tokens of each image as if the others did not exist; positions stay those of the whole grid.

        Args:
            images: (B, in_channels, H, W) float.
            visible: (B, n) int64 in [0, L), the tokens that are kept.
        Returns: (B, n, channels[-1]) after the final norm, in the order of visible, without the class token.
        Raises: ValueError for images or visible of other shapes.
        """
        ...


def head_depth(encoder: Encoder, rule: DepthRule) -> int:
    """Give the depth of a task's head on this encoder.

    official: the depth of the last block, so that even the head's rate is scaled by decay ** 1.
    timm: one more, so that the head's rate is not scaled.
    Source: the official finetuning code (golden/mixmim_optimization.json); timm's param_groups_layer_decay.
    """
    return encoder.num_blocks if rule == "official" else encoder.num_blocks + 1


def stage_depths(encoder: nn.Module, depths: Sequence[int]) -> dict[str, int]:
    """Give the depth of every parameter of a pyramid, for Encoder.parameter_depths.

    Blocks are named stages.STAGE.blocks.BLOCK. What leads to a later stage (downsampling, patch embedding, positions)
    and a PEG have the depth of the stage's first block, a norm at the end of a stage that of its last block, the final
    norm that of the last block of all. The patch embedding and the positions of the first stage, and all else outside
    of the stages, are the stem.

    Args: encoder: with the parameters.  depths: blocks of each stage.
    Returns: depth by name, in [0, sum(depths)], in the order of named_parameters.
    Source: the official finetuning code and timm's rules, which differ in the head alone (head_depth).
    """

    def depth(name: str) -> int:
        part, *rest = name.split(".")
        if part != "stages":
            return sum(depths) if part == "norm" else 0
        stage, kind, block = int(rest[0]), rest[1], rest[2] if len(rest) > 2 else ""
        first = sum(depths[:stage])
        if kind == "blocks":
            return first + int(block) + 1
        if kind == "norm":
            return first + depths[stage]
        return 0 if stage == 0 and kind in ("patch_embed", "pos_embed") else first + 1

    return {name: depth(name) for name, _ in encoder.named_parameters()}


def fill_tokens(x: Tensor, fill: TokenFill | None) -> Tensor:
    """Replace the tokens of the cells that a fill names.

    Args: x: (B, H, W, C), the embedded patches; H and W are multiples of the fill's grid.  fill: None returns x.
    Returns: (B, H, W, C), dtype of x.
    """
    if fill is None:
        return x
    covered = upsample_group_map(fill.mask, (x.shape[1], x.shape[2]))
    return torch.where(covered[..., None], fill.token.to(x.dtype), x)


def add_mix_embedding(x: Tensor, embedding: MixEmbedding | None, stage: int) -> Tensor:
    """Add to each token the vector of its group.

    Args: x: (B, H, W, C) at the start of a stage.  embedding: None returns x.  stage: index of the stage.
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


def check_inputs(images: Tensor, group_map: Tensor | None, *, in_channels: int, stride: int) -> None:
    """Raise ValueError unless images are whole tokens of the last stage, and the cells of a map whole tokens too.

    Args: images, group_map: as in Encoder.features.  stride: pixels per token of the last stage.
    """
    check_images(images, in_channels)
    height, width = cell_grid(images.shape[2], images.shape[3], stride)
    if group_map is not None:
        check_group_map(group_map, num_mixes=len(images))
        rows, columns = group_map.shape[1:]
        if not rows or not columns or height % rows or width % columns:
            raise ValueError(
                f"a group map of {rows} x {columns} cells does not fit images of {images.shape[2]} x "
                f"{images.shape[3]} px: a cell must be a whole number of the encoder's last tokens of {stride} px, so "
                f"use for example {height} x {width} cells"
            )
