"""Attention of all tokens to a coarser grid of keys, restricted to the keys of one's own group.

Legend: B samples, M group maps (B or 1), H W the grid of tokens, R the reduction, L = (H / R) * (W / R) keys,
C channels, N heads, D = C / N.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def readable_keys(group_map: Tensor | None, sr_ratio: int) -> Tensor | None:
    """Say which keys each token may read: those of its own group. It is made once for all blocks of a stage.

    A token always reads the key that its own block became, so that no row is empty.

    Args:
        group_map: (M, H, W) int64 at the grid's own resolution, constant in blocks of R x R tokens (so that a key
            belongs to one group); or None.
        sr_ratio: R, a divisor of H and W.
    Returns: (M, 1, H*W, L) bool, True = may read, or None where all may. A map shared by the batch stays one.
    """
    if group_map is None:
        return None
    keys = group_map[:, ::sr_ratio, ::sr_ratio].flatten(1)
    return (group_map.flatten(1)[:, :, None] == keys[:, None])[:, None]


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values are taken from blocks of tokens, each reduced to one.

    Args:
        dim: C.
        num_heads: N, a divisor of dim.
        sr_ratio: R, side of the blocks in tokens; 1 = all tokens are keys.
    Source: PVT (Wang et al. 2021, section 3.3); Twins' global sub-sampled attention is the same. Blocks do not overlap,
        and lie inside a mask cell where R tokens do, so that the reduction itself needs no group map.
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

    def forward(self, x: Tensor, readable: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  readable: see readable_keys.  Returns: (B, H, W, C)."""
        batch, height, width, dim = x.shape
        reduced = x
        if self.sr_ratio > 1:
            reduced = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H / R, W / R, C)
        query = self.q(x).view(batch, height * width, self.num_heads, -1).transpose(1, 2)  # (B, N, H*W, D)
        pairs = self.kv(reduced).view(batch, -1, 2, self.num_heads, dim // self.num_heads)
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=readable)
        return self.proj(read.transpose(1, 2).reshape(x.shape))
