"""Group normalisation of a mix, with the statistics of each image alone.

Beware of two meanings of group: nn.GroupNorm's groups are of channels (num_groups of them), a group map's are of cells.

Legend: B samples, M group maps (B or 1), C channels, H W a grid of tokens, h w the grid of mask cells, L = h*w, u v the
tokens of a cell down and across, N = num_groups groups of C / N channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose mean and variance, under a group map, are those of the token's own image.

    Group isolation is exact. Sums are taken in every cell and then over the cells of a group, so the number of groups
    need not be known.
    Source: ours. Paper section A.3 mixes convolutions and does not mention norms, but GroupNorm's plain statistics
        would leak each image of a mix to all others.
    """

    def forward(self, x: Tensor, group_map: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            x: (B, C, H, W) float.
            group_map: (M, h, w) int64, whose cells divide the grid; None = nn.GroupNorm.
        Returns: (B, C, H, W), dtype of x.
        Raises: ValueError if the cells do not divide the grid.
        """
        if group_map is None:
            return super().forward(x)
        batch, _, height, width = x.shape
        rows, columns = group_map.shape[1:]
        if height % rows or width % columns:
            raise ValueError(f"a group map of {rows} x {columns} cells does not divide a grid of {height} x {width}")
        own = group_map.flatten(1)
        own = (own[:, :, None] == own[:, None, :])[:, None]  # (M, 1, L, L)
        cells = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is too coarse for the sums
        # (B, N, C / N, h, u, w, v)
        cells = cells.reshape(batch, self.num_groups, -1, rows, height // rows, columns, width // columns)

        def group_mean(values: Tensor) -> Tensor:
            """Average over channels and the tokens of the cell's group: (B, N, 1, h, 1, w, 1)."""
            per_cell = values.mean(dim=(2, 4, 6)).flatten(2)[:, :, None]  # (B, N, 1, L)
            # where and not a product: an overflow in another image must not become a NaN here.
            mean = torch.where(own, per_cell, 0.0).sum(dim=3) / own.sum(dim=3)  # (B, N, L)
            return mean.view(batch, self.num_groups, 1, rows, 1, columns, 1)

        centred = cells - group_mean(cells)
        normalised = centred * (group_mean(centred.square()) + self.eps).rsqrt()
        return (normalised.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
