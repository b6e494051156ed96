"""What PVT and Twins have in common: four stages at strides 4 to 32, with attention to spatially reduced keys.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of a stage, h w the grid of mask cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from mixmae.encoders.base import DepthRule, GroupIsolation, TokenFill, check_images
from mixmae.layers.initialisation import init_projections
from mixmae.mixing import MASK_UNIT_PX, cell_grid, check_group_map

PATCH_SIDES = (4, 2, 2, 2)
"""What a token of each stage covers along a side of the stage's input."""
STRIDES = (4, 8, 16, 32)
NORM_EPS = 1e-6
"""Of the norms in blocks and after stages; those of patch embeddings and reductions keep torch's 1e-5 (both published
codes, and timm)."""


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The sizes of a PyramidEncoder."""

    image_size: int | tuple[int, int] = 224
    """Side, or height and width, in pixels; multiples of 32. Position tables, where there are any, are built for it."""
    in_channels: int = 3
    """Channels of the images."""
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    """Width of each of the four stages."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks in each stage."""
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    """Attention heads in each stage."""
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    """Hidden width of a block's perceptron over its width, in each stage."""
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    """Side, in tokens, of the blocks that attention reduces to one key, in each stage; 1 = no reduction."""
    drop_path: float = 0.0
    """Probability to drop the branches of the last block, rising from 0 at the first; 0 for pretraining."""

    def __post_init__(self) -> None:
        cell_grid(*self.image_sides)
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        for name in ("embed_dims", "depths", "num_heads", "sr_ratios"):
            check_stages(name, getattr(self, name))
        if len(self.mlp_ratios) != len(STRIDES) or min(self.mlp_ratios) <= 0:
            raise ValueError(f"mlp_ratios needs {len(STRIDES)} numbers above 0, one a stage; got {self.mlp_ratios}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"a width of {dim} cannot be shared by {heads} heads: change embed_dims or num_heads")
        for stride, ratio in zip(STRIDES, self.sr_ratios, strict=True):
            if MASK_UNIT_PX % (stride * ratio):
                raise ValueError(
                    f"a reduction by {ratio} at stride {stride} would merge mask cells of {MASK_UNIT_PX} px: "
                    f"its sr_ratio must divide {MASK_UNIT_PX // stride}"
                )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path is a probability below 1, got {self.drop_path}")

    @property
    def image_sides(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Channels that each stage takes."""
        return (self.in_channels, *self.embed_dims[:-1])


def check_stages(name: str, values: tuple[int, ...]) -> None:
    """Raise ValueError unless there is a number of at least 1 for each stage."""
    if len(values) != len(STRIDES) or min(values) < 1:
        raise ValueError(f"{name} needs {len(STRIDES)} numbers of at least 1, one a stage; got {values}")


class PyramidEncoder(nn.Module):
    """Stages in a row as an Encoder (see base.py).

    Group isolation is exact: with a group map no feature depends on a pixel of another group, at any stage.

    Args:
        config: the sizes.
        stages: four modules that take (B, C, H, W) of the stage before or the images, the group map (M, h, w) or None,
            and a fill or None, and return (B, embed_dims[s], H / 2, W / 2) (the first: H / 4, W / 4). Each has a
            patch_embed and blocks, and may have a pos_embed, a peg and a norm.
        norm: the final norm; nn.Identity() where the stages end in norms.
    """

    group_isolation: GroupIsolation = "exact"

    def __init__(self, config: PyramidConfig, stages: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_sides
        self.in_channels = config.in_channels
        self.channels: tuple[int, ...] = config.embed_dims
        self.strides: tuple[int, ...] = STRIDES
        self.num_blocks = sum(config.depths)
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        init_projections(self)

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute the normalised tokens of the last stage, (B, L, channels[-1]). See Encoder.forward."""
        return self.norm(self.features(images, group_map, fill)[-1].flatten(2).transpose(1, 2))

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of each stage, (B, channels[s], H, W). See Encoder.features."""
        check_images(images, self.in_channels)
        cells = cell_grid(images.shape[2], images.shape[3])
        if group_map is not None:
            check_group_map(group_map, num_mixes=len(images), grid=cells)
        x, outputs = images, []
        for stage in self.stages:
            x = stage(x, group_map, fill)
            fill = None  # it stands in the first stage's tokens now
            outputs.append(x)
        return outputs

    def parameter_depths(self, rule: DepthRule = "official") -> dict[str, int]:
        """Give the depth of every parameter. See Encoder.parameter_depths.

        The first patch embedding and its positions are the stem. Both rules give what leads to a later stage (patch
        embedding, positions) and the PEG the depth of the stage's first block, and a norm that of the block before it;
        for these encoders they differ in the head alone (base.head_depth).
        """
        first_block = [sum(self.config.depths[:stage]) for stage in range(len(STRIDES))]

        def depth(name: str) -> int:
            part, *rest = name.split(".")
            if part == "norm":
                return self.num_blocks
            stage, kind = int(rest[0]), rest[1]  # stages.STAGE.KIND...
            if stage == 0 and kind in ("patch_embed", "pos_embed"):
                return 0
            if kind == "norm":
                return first_block[stage] + self.config.depths[stage]
            return first_block[stage] + 1 + (int(rest[2]) if kind == "blocks" else 0)

        return {name: depth(name) for name, _ in self.named_parameters()}
