"""Mix K images into one along a map of cells, and take them apart again (MixMAE sections 3.1 and 3.2).

Legend: B images, M mixes, K images per mix, H W pixels, h w the grid of mask cells, L = h*w, C channels.
A cell is a whole number of the encoder's last tokens, so groups share no token at any stage (paper section 4).
`group_map` is int64 in [0, K): which image of the mix fills a cell. Its first side is M, or 1 when all mixes share it.
`partners` is int64 (M, K) in [0, B): which image of the batch fills group k of mix m. It is always an argument, so that
any pairing is the same code: the official one (the batch reversed, K = 2) is partners = [[b, B - 1 - b] for b].
`mask` is bool, True = removed. All functions are pure; randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_group_map(
    grid: tuple[int, int],
    num_images: int,
    generator: torch.Generator,
    num_maps: int = 1,
    filled_share: float = 0.0,
) -> Tensor:
    """Draw random balanced partitions of a grid of cells into groups, one group per image of a mix.

    Group sizes differ by at most one. Where L is no multiple of K, which groups get one more cell is drawn for the
    first map and rotates from map to map, so that no image is favoured: 49 cells over 4 images are 13/12/12/12 in any
    order.

    Args:
        grid: (h, w) cells.
        num_images: K, at least 1 and at most h*w.
        generator: CPU generator; the draw is a function of its state.
        num_maps: number of maps to draw; 1 is a map shared by the whole batch.
        filled_share: share of the cells, rounded, that show no image: these filler cells are group K.
    Returns: (num_maps, h, w) int64 in [0, K), or in [0, K] with filler cells, on the CPU.
    Raises: ValueError if fewer cells are left than there are images, or the generator is not on the CPU.
    Source: paper section 3.2 (random mask) and section 4 (mixing 4 images hides 75 %). The paper does not state which
        image gets the odd cell; the official code (K = 2) always gives it to the first one.
    """
    height, width = grid
    num_cells = height * width
    num_filled = round(filled_share * num_cells)
    num_shown = num_cells - num_filled
    if num_images < 1 or num_maps < 1:
        raise ValueError(f"num_images and num_maps must be at least 1, got {num_images} and {num_maps}")
    if num_shown < num_images:
        raise ValueError(
            f"a grid of {height} x {width} cells cannot hold parts of {num_images} images; use larger images, smaller "
            "cells, or mix fewer images"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, so that every device draws alike; got {generator.device}")
    first_large = torch.randint(num_images, (1, 1), generator=generator)
    # From map to map the larger groups rotate by how many they are, so over K maps each image is large equally often.
    start = first_large + torch.arange(num_maps)[:, None] * (num_shown % num_images)  # (num_maps, 1)
    rank = torch.rand(num_maps, num_cells, generator=generator).argsort(dim=1)  # a permutation of the cells in each row
    groups = torch.where(rank < num_shown, (start + rank) % num_images, num_images)
    return groups.view(num_maps, height, width)


def cyclic_partners(num_samples: int, num_images: int) -> Tensor:
    """Choose the images of each mix so that each image appears in K mixes, once in every group.

    Blocks of K consecutive images mix with each other: mix j*K + i shows image j*K + (i + k) % K in group k.
    The other natural extension of the official pairing (mix b shows image (b + k*B/K) mod B in group k) also cuts the
    batch into closed sets of K. For a shuffled stream the two differ only in the order of the samples, but blocks do
    not depend on how a global batch is cut into micro-batches and workers, as long as each part is a multiple of K.
    The stream must be shuffled, because neighbours mix.

    Args:
        num_samples: B, a multiple of K.
        num_images: K.
    Returns: (B, K) int64, on the CPU.
    Raises: ValueError if B is not a positive multiple of K.
    Source: the official code for K = 2, extended to any K.
    """
    if num_samples < 1 or num_samples % num_images:
        lower = num_samples - num_samples % num_images
        near = f"{lower} or {lower + num_images}" if lower else f"{num_images}"
        raise ValueError(
            f"{num_samples} images cannot be mixed by {num_images}: the batch of each worker and step must be a "
            f"multiple of {num_images}, for example {near}"
        )
    mix_index = torch.arange(num_samples)[:, None]
    in_block = mix_index % num_images
    return mix_index - in_block + (in_block + torch.arange(num_images)) % num_images


def upsample_group_map(group_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat every cell of a group map so that it covers a finer grid (nearest upsampling).

    Args:
        group_map: (M, h, w), any dtype: a mask may be upsampled too.
        size: (H, W) of the finer grid, whole multiples of (h, w).
    Returns: (M, H, W), dtype of group_map.
    Raises: ValueError if a side of size is not a multiple of the map's.
    Source: paper section 3.3 (masks of all stages are nearest upsamplings of one).
    """
    num_maps, rows, columns = group_map.shape
    if size[0] % rows or size[1] % columns or not size[0] or not size[1]:
        raise ValueError(f"a group map of {rows} x {columns} cells does not divide a grid of {size[0]} x {size[1]}")
    up, across = size[0] // rows, size[1] // columns
    cells = group_map[:, :, None, :, None].expand(num_maps, rows, up, columns, across)
    return cells.reshape(num_maps, *size)


def group_sizes(group_map: Tensor) -> tuple[int, ...]:
    """Count the cells of each group, the largest group first: the sizes that all maps have, whichever group has which.

    Args: group_map: (M, h, w) int64, at least 0. On a GPU the host waits for it.
    Returns: one size per group from 0 to the last one in the maps; empty if the maps have groups of other sizes.
    Example: 49 cells over 4 images are (13, 12, 12, 12).
    """
    groups = group_map.flatten(1).cpu()
    counts = torch.zeros(len(groups), int(groups.max()) + 1, dtype=torch.int64)
    counts = counts.scatter_add_(1, groups, torch.ones_like(groups)).sort(dim=1, descending=True).values
    return tuple(counts[0].tolist()) if (counts == counts[0]).all() else ()


def mix(images: Tensor, group_map: Tensor, partners: Tensor) -> Tensor:
    """Fill each mix with the pixels of its K images, cell by cell.

    Where the patches of an embedding do not overlap and divide the cell, mixing pixels equals mixing tokens.

    Args:
        images: (B, C, H, W), any dtype.
        group_map: (M, h, w) or (1, h, w) int64 in [0, K); see check_group_map.
        partners: (M, K) int64 in [0, B).
    Returns: (M, C, H, W), dtype of images.
    Raises: ValueError if images are no whole number of cells.
    Source: paper section 3.2, equation 1, for K images.
    """
    _, channels, height, width = images.shape
    rows, columns = group_map.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"images of {height} x {width} px cannot be cut into {rows} x {columns} cells")
    up, across = height // rows, width // columns
    groups = group_map.flatten(1).expand(len(partners), -1)  # (M, L)
    source = partners.gather(1, groups).view(-1, 1, rows, 1, columns)  # in [0, B): which image fills each cell
    # A row of a cell is consecutive in memory, and so are those of a mix: rows are copied, and nothing is permuted.
    row = torch.arange(channels * height * columns, device=images.device).view(channels, rows, up, columns)
    row = row + source * (channels * height * columns)  # (M, channels, rows, up, columns)
    return images.reshape(-1, across).index_select(0, row.flatten()).view(-1, channels, height, width)


def hidden_mask(group_map: Tensor, num_images: int) -> Tensor:
    """Find the cells of each image that its mix does not show.

    Args:
        group_map: (M, h, w) or (1, h, w) int64. Groups that are not below num_images are hidden for all images.
        num_images: K.
    Returns: (M or 1, K, h, w) bool, True = hidden. Without filler cells every cell is visible for exactly one image.
    """
    groups = torch.arange(num_images, device=group_map.device)
    return group_map[:, None] != groups[:, None, None]


def unmix(tokens: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Give each image of a mix its own copy of the tokens, with those of the other images replaced.

    Args:
        tokens: (M, L, C).
        mask: (M, K, L) or (1, K, L) bool, True = replaced by fill.
        fill: broadcasts to (M, K, L, C), for example a mask token of (C,).
    Returns: (M, K, L, C), the wider dtype of tokens and fill.
    Raises: ValueError if the shapes disagree.
    Source: paper section 3.2, dual reconstruction.
    """
    if tokens.ndim != 3 or mask.ndim != 3 or mask.shape[2] != tokens.shape[1] or len(mask) not in (1, len(tokens)):
        raise ValueError(
            f"tokens (M, L, C) and mask (M or 1, K, L) disagree: {tuple(tokens.shape)} and {tuple(mask.shape)}"
        )
    return torch.where(mask[..., None], fill, tokens[:, None])


def check_group_map(group_map: Tensor, num_mixes: int, grid: tuple[int, int] | None = None) -> None:
    """Raise ValueError unless group_map is int64 (num_mixes or 1, h, w), with (h, w) = grid where a grid is given."""
    if group_map.ndim != 3 or group_map.dtype != torch.int64:
        raise ValueError(
            f"a group map is int64 of shape (M or 1, h, w); got {group_map.dtype} of shape {tuple(group_map.shape)}"
        )
    if len(group_map) not in (1, num_mixes):
        raise ValueError(f"{len(group_map)} group maps for {num_mixes} mixes: give one map, or one for each mix")
    if grid is not None and tuple(group_map.shape[1:]) != tuple(grid):
        raise ValueError(
            f"the group map has {group_map.shape[1]} x {group_map.shape[2]} cells, but the images have {grid[0]} x "
            f"{grid[1]} cells"
        )


def cell_grid(height_px: int, width_px: int, cell_px: int) -> tuple[int, int]:
    """Return the (h, w) grid of the cells (or tokens) of an image.

    Args: cell_px: side of a cell in pixels.
    Raises: ValueError if a side is not a positive multiple of cell_px.
    """
    if height_px < 1 or width_px < 1 or height_px % cell_px or width_px % cell_px:
        near = " x ".join(str(max(1, round(side / cell_px)) * cell_px) for side in (height_px, width_px))
        raise ValueError(
            f"image sides must be multiples of {cell_px} px, got {height_px} x {width_px}; use for example {near}"
        )
    return height_px // cell_px, width_px // cell_px


def tokens_per_cell(cell_px: int, stride: int) -> int:
    """Return the side of a mask cell in tokens of the encoder's last stage.

    Args: cell_px: side of a cell in pixels.  stride: pixels per token along a side.
    Raises: ValueError unless it is a whole number of at least 1.
    """
    if cell_px < 1 or cell_px % stride:
        raise ValueError(
            f"a mask cell of {cell_px} px would cut the encoder's last tokens of {stride} px: make cell_px a multiple "
            f"of {stride}"
        )
    return cell_px // stride
