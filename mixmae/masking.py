"""Hide random cells of images, and put back what was left out (the masks of SimMIM and MAE).

Legend: B samples, C channels, H W pixels, h w a grid of cells, L = h*w, n visible cells of a sample, D a token's width.
`mask` is bool (B, h, w), True = removed. A cell is a whole number of the encoder's last tokens.
All functions are pure; randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mixmae.mixing import upsample_group_map


def num_removed(num_cells: int, mask_ratio: float) -> int:
    """Count the cells that a ratio removes: its share of the cells, rounded up.

    Raises: ValueError if no cell would be removed, or none left.
    Source: SimMIM's code removes ceil(ratio * L) cells and MAE's keeps int((1 - ratio) * L), which is the same count
        but for floating point: theirs would remove 56 of 100 cells at 0.55 and keep 4 of 25 at 0.8, ours 55 and 5.
    """
    removed = math.ceil(round(mask_ratio * num_cells, 6))
    if not 0 < removed < num_cells:
        raise ValueError(
            f"a mask_ratio of {mask_ratio} removes {removed} of {num_cells} cells: some must be removed and some left, "
            "so change the ratio, or use larger images or smaller cells"
        )
    return removed


def draw_masks(
    grid: tuple[int, int], mask_ratio: float, generator: torch.Generator, num_masks: int = 1, first_mask: int = 0
) -> Tensor:
    """Draw masks that remove equally many cells each; all sets of so many cells are equally likely.

    Args:
        grid: (h, w) cells.
        mask_ratio: share of the cells to remove; see num_removed.
        generator: CPU generator; the draw is a function of its state.
        num_masks: masks to return.
        first_mask: index of the first mask to return, so that parts of a batch get the masks of the whole.
    Returns: (num_masks, h, w) bool, on the CPU.
    Raises: ValueError as num_removed, or if the generator is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, so that every device draws alike; got {generator.device}")
    num_cells = grid[0] * grid[1]
    removed = num_removed(num_cells, mask_ratio)
    order = torch.rand(first_mask + num_masks, num_cells, generator=generator)[first_mask:].argsort(dim=1)
    mask = torch.zeros(num_masks, num_cells, dtype=torch.bool)
    return mask.scatter(1, order[:, :removed], True).view(num_masks, *grid)


def masks_of_batch(
    mask: Tensor | None,
    *,
    num_samples: int,
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator | None,
    first_sample: int,
) -> Tensor:
    """Return one mask per sample: the given ones, checked, or new draws.

    Args:
        mask: (B, h, w) or (1, h, w) bool, or None to draw one per sample.
        num_samples: B.  grid: (h, w).  mask_ratio, generator: for drawing; see draw_masks.
        first_sample: index of the first sample in the global batch, of which this may be a part.
    Returns: (B, h, w) bool.
    Raises: ValueError if there is nothing to draw from, or the mask has another dtype or shape or removes nothing.
    """
    if mask is None:
        if generator is None:
            raise ValueError("pass generator= (a CPU torch.Generator) to draw masks, or pass mask=")
        return draw_masks(grid, mask_ratio, generator, num_samples, first_sample)
    if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) not in (1, num_samples) or mask.shape[1:] != grid:
        raise ValueError(
            f"the mask must be bool of shape ({num_samples} or 1, {grid[0]}, {grid[1]}), got {mask.dtype} of "
            f"{tuple(mask.shape)}"
        )
    if mask.device.type == "cpu" and not mask.any():  # on a GPU the check would wait
        raise ValueError("the mask removes no cell, so there is nothing to predict")
    return mask.expand(num_samples, -1, -1)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Set the removed cells to zero, which is the mean colour of normalised pixels.

    Args: images: (B, C, H, W).  mask: (B, h, w) bool; H and W are multiples of h and w.   Returns: (B, C, H, W).
    """
    return images.masked_fill(upsample_group_map(mask, (images.shape[2], images.shape[3]))[:, None], 0.0)


def visible_cells(mask: Tensor) -> Tensor:
    """List the cells that each sample keeps, in row order.

    Args: mask: (B, h, w) bool.   Returns: (B, n) int64 in [0, L).
    Raises: ValueError if samples keep different numbers of cells, or none.
    """
    kept = ~mask.flatten(1)
    counts = kept.sum(dim=1)
    if counts.min() != counts.max() or not counts.min():
        raise ValueError(
            f"every sample must keep the same number of cells, at least one; this mask leaves {counts.min()} to "
            f"{counts.max()}"
        )
    return kept.nonzero()[:, 1].view(len(mask), -1)


def place_tokens(tokens: Tensor, visible: Tensor, num_cells: int) -> Tensor:
    """Put the tokens of the visible cells back where the cells are, with zeros elsewhere.

    Args: tokens: (B, n, D).  visible: (B, n) int64, the cell of each token.  num_cells: L.   Returns: (B, L, D).
    """
    dim = tokens.shape[2]
    return tokens.new_zeros(len(tokens), num_cells, dim).scatter(1, visible[..., None].expand(-1, -1, dim), tokens)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Average over the removed cells of all samples.

    Args: error: (B, L) float32.  mask: (B, L) bool.   Returns: scalar.
    """
    return (error * mask).sum() / mask.sum()


def mask_pictures(images: Tensor, predictions: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Describe masked images as mixes of one image: group 0 is visible, group 1 is removed.

    Args: images: (B, C, H, W).  predictions: of patches.draw_predictions, each (B, C, H, W).  mask: (B, h, w) bool.
    Returns: what panels.reconstruction_panel draws, detached: originals, mixed (B, C, H, W), with removed cells blank;
        the predictions, each (B, 1, C, H, W);  group_map (B, h, w) int64, 0 visible and 1 removed;  partners (B, 1).
    """
    return {
        "originals": images.detach(),
        "mixed": hide(images, mask).detach(),
        **{name: drawn[:, None] for name, drawn in predictions.items()},
        "group_map": mask.long(),
        "partners": torch.arange(len(images), device=images.device)[:, None],
    }
