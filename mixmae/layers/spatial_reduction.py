"""Attention of all tokens to a coarser grid of keys.

Legend: B samples, M group maps (B or 1), H W the grid of tokens, R the reduction, L = (H / R) * (W / R) keys,
C channels, N heads, D = C / N.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixmae.layers.attention import attend


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values are taken from blocks of tokens, each reduced to one.

    Args:
        dim: C.
        num_heads: N, a divisor of dim.
        sr_ratio: R, side of the blocks in tokens; 1 = all tokens are keys.
    Source: PVT (Wang et al. 2021, section 3.3); Twins' global sub-sampled attention is the same. Blocks do not overlap
        and R tokens divide the side of a mask cell, so the reduction itself needs no group map.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  attn_mask: (M, 1, H*W, L), of blocks.group_attn_mask.  Returns: (B, H, W, C)."""
        batch, height, width, dim = x.shape
        reduced = x
        if self.sr_ratio > 1:
            reduced = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H / R, W / R, C)
        query = self.q(x).view(batch, height * width, self.num_heads, -1).transpose(1, 2)  # (B, N, H*W, D)
        pairs = self.kv(reduced).view(batch, -1, 2, self.num_heads, dim // self.num_heads)
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        read = attend(query, key, value, attn_mask)
        return self.proj(read.transpose(1, 2).reshape(x.shape))
