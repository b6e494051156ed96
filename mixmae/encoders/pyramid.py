"""What PVT and Twins have in common: stages that halve the grid, with attention to spatially reduced keys.

Legend: B samples, M group maps (B or 1), C channels, H W the grid of a stage, h w the grid of mask cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from mixmae.encoders.base import GroupIsolation, StagesConfig, TokenFill, check_inputs, stage_depths
from mixmae.layers.initialisation import init_projections
from mixmae.mixing import cell_grid

NORM_EPS = 1e-6
"""Of the norms in blocks and after stages; norms of patch embeddings and reductions keep torch's 1e-5 (both published
codes, and timm)."""


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(StagesConfig):
    """The sizes of a PyramidEncoder."""

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    """Width of each stage."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks in each stage; two to four stages."""
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    """Attention heads in each stage."""
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    """Hidden width of a block's MLP over its width, in each stage."""
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    """Side, in tokens, of the blocks that attention reduces to one key, in each stage; 1 = no reduction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages("embed_dims", "num_heads", "sr_ratios")
        if len(self.mlp_ratios) != len(self.depths) or min(self.mlp_ratios) <= 0:
            raise ValueError(
                f"mlp_ratios needs {len(self.depths)} numbers above 0, one per stage of depths; got {self.mlp_ratios}"
            )
        self.check_heads("embed_dims", self.embed_dims, self.num_heads)
        last = self.strides[-1]  # a mask cell is a multiple of it, and so is the image
        for stride, ratio in zip(self.strides, self.sr_ratios, strict=True):
            if last % (stride * ratio):
                raise ValueError(
                    f"a reduction by {ratio} at stride {stride} would merge mask cells of {last} px, the last stride: "
                    f"its sr_ratio must divide {last // stride}"
                )

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Channels that each stage takes."""
        return (self.in_channels, *self.embed_dims[:-1])

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Side of the patches of each stage, in pixels or tokens of the stage's input."""
        return (self.patch_px, *(2 for _ in self.depths[1:]))


class PyramidEncoder(nn.Module):
    """Stages in a row as an Encoder (see base.py).

    Group isolation is exact: with a group map no feature depends on a pixel of another group, at any stage.

    Args:
        config: the sizes.
        stages: modules, called with the images or the output of the stage before (B, C, H, W), the group map
            (M, h, w) or None, and a fill or None. They return (B, embed_dims[s], H / p, W / p), p the stage's
            patch_sides. Each has a patch_embed and blocks, and may have a pos_embed, a peg and a norm.
        norm: the final norm; nn.Identity() where the stages end in norms.
    """

    group_isolation: GroupIsolation = "exact"

    def __init__(self, config: PyramidConfig, stages: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_sides
        self.in_channels = config.in_channels
        self.channels: tuple[int, ...] = config.embed_dims
        self.fill_dim = config.embed_dims[0]
        self.strides = config.strides
        self.cell_px = config.cell_px
        cell_grid(*self.image_size, self.strides[-1])
        self.num_blocks = sum(config.depths)
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        init_projections(self)

    def forward(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> Tensor:
        """Compute the normalised tokens of the last stage, (B, L, channels[-1]). See Encoder.forward."""
        return self.final(self.features(images, group_map, fill)[-1])

    def final(self, feature: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Normalise each token of the last stage: (B, C, H, W) to (B, L, C). See Encoder.final."""
        return self.norm(feature.flatten(2).transpose(1, 2))

    def features(self, images: Tensor, group_map: Tensor | None = None, fill: TokenFill | None = None) -> list[Tensor]:
        """Compute the output of each stage, (B, channels[s], H, W). See Encoder.features."""
        check_inputs(images, group_map, in_channels=self.in_channels, stride=self.strides[-1])
        x, outputs = images, []
        for stage in self.stages:
            x = stage(x, group_map, fill)
            fill = None  # applied by the first stage
            outputs.append(x)
        return outputs

    def parameter_depths(self) -> dict[str, int]:
        """Give the depth of every parameter. See Encoder.parameter_depths and stage_depths."""
        return stage_depths(self, self.config.depths)
