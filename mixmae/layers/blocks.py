"""The transformer block and its plain parts.

Normalisation and the MLP act on single tokens, so they cannot carry anything from one group to another. Attention can:
it takes an `attn_mask`, which is bool and True where a query may attend to a key, as in torch. A pair that may not has
a weight and a gradient of exactly zero.

Legend: B samples, M group maps (B or 1), H W the grid of tokens, L tokens, C channels, N heads.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.layers.attention import attend
from mixmae.layers.drop_path import DropPath


def group_attn_mask(groups: Tensor | None, sr_ratio: int = 1) -> Tensor | None:
    """Let each token attend to the keys of its own group. One mask serves all blocks of a stage.

    A token may always attend to the key that its own block became, so no row is all False.

    Args:
        groups: (M, H, W) int64, the group of each token; None = no groups. Constant in blocks of sr_ratio x sr_ratio
            tokens, so that a key belongs to one group.
        sr_ratio: side of the blocks that are reduced to one key, a divisor of H and W; 1 = every token is a key.
    Returns: (M, 1, H*W, keys) bool, True = may attend; None where all may. A map that the batch shares stays one.
    """
    if groups is None:
        return None
    keys = groups[:, ::sr_ratio, ::sr_ratio].flatten(1)
    return (groups.flatten(1)[:, :, None] == keys[:, None])[:, None]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token alone."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention of the tokens of a sequence to each other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Args: x: (B, L, C).  attn_mask: (M, 1, L, L) bool, or None where all may attend to all, as in the decoder.

        Returns: (B, L, C).
        """
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, C / N)
        read = attend(query, key, value, attn_mask)
        return self.proj(read.transpose(1, 2).reshape(batch, length, dim))


class TransformerBlock(nn.Module):
    """A pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x)), each branch under stochastic depth.

    Args:
        dim: C.
        attention: called with the normalised x and the further arguments of forward.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: probability that a branch of a sample is dropped.
        norm_eps: added to the variance by the norms.
    """

    def __init__(
        self, dim: int, attention: nn.Module, *, mlp_ratio: float, drop_path: float = 0.0, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        """Args: x: (..., C).  context: what the attention needs, such as an attn_mask or a WindowPlan."""
        return self.transform(self.read(x, *context))

    def read(self, x: Tensor, *context: object) -> Tensor:
        """The first half: tokens read each other. Arguments as of forward."""
        return x + self.drop_path(self.attn(self.norm1(x), *context))

    def transform(self, x: Tensor) -> Tensor:
        """The second half, of each token alone."""
        return x + self.drop_path(self.mlp(self.norm2(x)))
