"""The positions of tokens: fixed sin-cos tables for the whole grid, learned tables of offsets for a window.

Legend: H W a grid of tokens, L = H*W, C channels, N tokens in a window, w a configured window side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BASE_WAVELENGTH = 10_000.0


def sin_cos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Build the fixed two-dimensional position table.

    The first half of the channels encodes the column, the second the row; each half is all sines, then all cosines.

    Args:
        dim: C, a multiple of 4.
        grid: (H, W).
    Returns: (H*W, C) float32, computed in float64.
    Raises: ValueError if dim is not a multiple of 4.
    Source: MAE and the official MixMAE code (order of the channels checked against its weights).
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    height, width = grid
    step = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    frequency = BASE_WAVELENGTH**-step

    def encode(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, C / 2)

    columns = encode(width)[None].expand(height, -1, -1)
    rows = encode(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def resize_positions(table: Tensor, grid: tuple[int, ...], new_grid: tuple[int, ...]) -> Tensor:
    """Interpolate a position table, bicubic, from one grid of tokens to another.

    Args: table: (1, H*W, C).  grid: its (H, W).
    Returns: (1, H'*W', C).
    Source: the official finetuning code.
    """
    image = table.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, C, H, W)
    return F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def positions_on_grid(table: Tensor, stored: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Give the fixed position table of a grid: `table` where that is the stored grid, else it resized.

    Loading weights into a model of another size resizes their table in the same way (mixmae.convert.load), so an
    encoder reads the same positions whether it was built for a size or meets it later.

    Args: table: (1, L, C), built for the grid `stored`.  grid: (H, W).
    Returns: (1, H*W, C), dtype and device of table.
    """
    return table if grid == stored else resize_positions(table, stored, grid)


def relative_position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Look up the bias of every pair of tokens in a window in a table of offsets.

    The offset of a pair is the query's position minus the key's. A window smaller than the configured one uses the
    central part of the table, which holds its offsets.

    Args:
        table: ((2w-1)**2, num_heads), rows in the order (row offset, column offset).
        window: (rows, columns), each at most w.
    Returns: (num_heads, N, N), N = rows * columns.
    Source: Swin. Sliding views replace the usual N*N index: no buffer, and a cheap, deterministic gradient.
    """
    side = round(len(table) ** 0.5)
    rows, columns = window
    offsets = table.view(side, side, -1)
    centre = (side - 1) // 2
    used = offsets[centre - rows + 1 : centre + rows, centre - columns + 1 : centre + columns]
    # The view at (i, j) starts at offset i - (rows - 1), so its k-th entry belongs to the (rows - 1 - k)-th key.
    pairs = used.unfold(0, rows, 1).unfold(1, columns, 1).flip(-2, -1)  # (rows, columns, num_heads, rows, columns)
    return pairs.permute(2, 0, 1, 3, 4).reshape(-1, rows * columns, rows * columns)
