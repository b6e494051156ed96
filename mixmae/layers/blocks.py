"""The transformer block and its plain parts.

Legend: B samples, L tokens, C channels, N heads. Normalisation and the perceptron act on single tokens, so they cannot
carry anything from one group to another; the attention that is put in must see to that itself.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.layers.drop_path import DropPath


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token alone."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens of a sequence: (B, L, C) -> (B, L, C).

    It takes no group map: the decoder reads sequences that hold one image each.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, C / N)
        read = F.scaled_dot_product_attention(query, key, value)
        return self.proj(read.transpose(1, 2).reshape(batch, length, dim))


class TransformerBlock(nn.Module):
    """A pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x)), each branch under stochastic depth.

    Args:
        dim: C, the last side of x.
        attention: the module to mix tokens with; it gets the normalised x and whatever else forward was given.
        mlp_ratio: hidden width of the perceptron over dim.
        drop_path: probability to drop a branch of a sample.
        norm_eps: what the norms add to the variance.
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
        x = x + self.drop_path(self.attn(self.norm1(x), *context))
        return x + self.drop_path(self.mlp(self.norm2(x)))
