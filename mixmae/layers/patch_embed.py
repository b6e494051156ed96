"""The first layer: pixels to tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Project patches that do not overlap to tokens, and normalise each token (norm=False: do not).

    Patches that do not overlap and divide a mask cell keep the groups of a mix apart, so no group map is needed.
    """

    def __init__(self, in_channels: int, dim: int, patch_px: int, *, norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_px, stride=patch_px)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, in_channels, H, W) as (B, H / patch_px, W / patch_px, C)."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))
