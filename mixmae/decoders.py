"""Decoders: encoded tokens to pixels.

Legend: M mixes, S sequences decoded from each (the images to reconstruct for MixMAE, 1 for MAE), L = h*w tokens of the
encoder's last stage, E the encoder's width, C the decoder's, p pixels per token along a side, P = p*p*channels values
of the pixels under a token in the order (row, column, channel).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmae.layers.blocks import SelfAttention, TransformerBlock
from mixmae.layers.initialisation import TABLE_STD, init_projections
from mixmae.layers.positions import positions_on_grid, sin_cos_positions
from mixmae.mixing import unmix


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The size of a PixelDecoder; the defaults are the paper's (section 3.2)."""

    dim: int = 512
    """Width; a multiple of 4 and of num_heads."""
    depth: int = 8
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads, as in the official code."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its width."""
    norm_eps: float = 1e-5
    """Added to the variance by the norms: the official code's value; mmpretrain's decoder and MAE's have 1e-6."""

    def __post_init__(self) -> None:
        if self.depth < 1 or self.num_heads < 1 or self.mlp_ratio <= 0 or self.norm_eps <= 0:
            raise ValueError(f"depth and num_heads must be at least 1, mlp_ratio and norm_eps above 0, got {self}")
        if self.dim < 4 or self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(
                f"the decoder's dim must be a multiple of 4 and of num_heads, got {self.dim} and {self.num_heads}"
            )


class PixelDecoder(nn.Module):
    """A small transformer that predicts the pixels under every token of an image from its visible tokens.

    Args:
        encoder_dim: E.
        patch_px: p, the encoder's last stride.
        channels: channels of the images.
        grid: (h, w) that the position table is stored for; other grids get a new table.
        config: the size.
    Source: paper section 3.2, "Dual Reconstruction"; MAE.
    """

    def __init__(
        self, *, encoder_dim: int, patch_px: int, channels: int, grid: tuple[int, int], config: DecoderConfig
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(encoder_dim, config.dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sin_cos_positions(config.dim, grid)[None])  # (1, L, C)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.dim,
                SelfAttention(config.dim, config.num_heads),
                mlp_ratio=config.mlp_ratio,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.pred = nn.Linear(config.dim, patch_px * patch_px * channels)
        init_projections(self)
        nn.init.trunc_normal_(self.mask_token, std=TABLE_STD)

    def forward(self, tokens: Tensor, mask: Tensor, grid: tuple[int, int], chosen: Tensor | None = None) -> Tensor:
        """Predict pixels for S sequences from each encoded one.

        Args:
            tokens: (M, L, E), of the encoder.
            mask: (M, S, L) or (1, S, L) bool, True = not visible in this sequence: replaced by the mask token.
            grid: (h, w), with h*w = L.
            chosen: (n,) int64, all different: predict these of the M*S*L tokens alone, which saves most of the last
                block and the widest layer for those that no loss needs; None = all.
        Returns: (M, S, L, P), for visible cells too; with chosen (n, P).
        Raises: ValueError if tokens and mask disagree on M or L.
        """
        x = unmix(self.embed(tokens), mask, self.mask_token)  # (M, S, L, C)
        lead = x.shape[:2]
        x = x.flatten(0, 1)  # (M * S, L, C): each sequence is a sample of its own, so no image sees another
        x = x + positions_on_grid(self.pos_embed, self.grid, grid)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, TransformerBlock)
        if chosen is None:
            return self.pred(self.norm(last(x))).unflatten(0, lead)
        # The others have been read by now, and what comes is of each token alone.
        x = last.read(x).flatten(0, 1).index_select(0, chosen)
        return self.pred(self.norm(last.transform(x)))


class PixelHead(nn.Module):
    """One linear layer from an encoder's last tokens to the pixels under each.

    Args: encoder_dim: E.  patch_px: p, the encoder's last stride.  channels: of the images.
    Source: SimMIM (CVPR 2022), which finds a linear head no worse than heavier ones.
    """

    def __init__(self, *, encoder_dim: int, patch_px: int, channels: int) -> None:
        super().__init__()
        self.pred = nn.Linear(encoder_dim, patch_px * patch_px * channels)
        init_projections(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict (B, L, P) from (B, L, E)."""
        return self.pred(tokens)
