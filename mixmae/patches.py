"""Images as rows of patches, and the per-patch normalisation of the pixels to predict.

Legend: B images, C channels, H W pixels, p the side of a patch in pixels, L = (H/p)*(W/p) patches in row order,
P = p*p*C values of a patch in the order (row, column, channel), which is the order of the official weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VARIANCE_EPS = 1e-6
"""Added to the variance of a patch before the root; value of MAE and of the official MixMAE code."""
DISTANCE_POWER = 3
"""A visible patch weighs 1 / distance^3 for a hidden one: 2 is nearly the image's mean, 5 nearly the nearest patch."""


def image_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Write an image size that is one side, or both, as (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


class NormalisedPatches(NamedTuple):
    """Patches with zero mean and unit std, and what undoes that: patches * std + mean."""

    patches: Tensor
    mean: Tensor
    std: Tensor


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """Cut images into patches.

    Args:
        images: (B, C, H, W), any dtype, H and W multiples of patch_px.
        patch_px: side of a patch in pixels.
    Returns: (B, L, P), dtype of images.
    Raises: ValueError if a side is not a multiple of patch_px.
    Source: paper section 3.1; pixel order as in MAE.
    """
    batch, channels, height, width = images.shape
    if height % patch_px or width % patch_px:
        raise ValueError(f"images of {height} x {width} px cannot be cut into patches of {patch_px} px")
    rows, columns = height // patch_px, width // patch_px
    cells = images.reshape(batch, channels, rows, patch_px, columns, patch_px)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_px * patch_px * channels)


def unpatchify(patches: Tensor, patch_px: int, grid: tuple[int, int]) -> Tensor:
    """Put patches back together: the inverse of patchify.

    Args:
        patches: (..., L, P).
        patch_px: side of a patch in pixels.
        grid: (rows, columns) of patches, with rows * columns = L.
    Returns: (..., C, H, W), dtype of patches.
    Raises: ValueError if L or P does not fit grid and patch_px.
    """
    *lead, num_patches, values = patches.shape
    rows, columns = grid
    if num_patches != rows * columns or values % patch_px**2:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} do not fill a grid of {rows} x {columns} patches of {patch_px} px"
        )
    channels = values // patch_px**2
    cells = patches.reshape(-1, rows, columns, patch_px, patch_px, channels)
    images = cells.permute(0, 5, 1, 3, 2, 4)  # (-1, C, rows, p, columns, p)
    return images.reshape(*lead, channels, rows * patch_px, columns * patch_px)


def normalise_patches(patches: Tensor) -> NormalisedPatches:
    """Shift and scale each patch to zero mean and unit std over all its values, channels together.

    Args: patches: (..., P) float.
    Returns: patches (..., P), and mean and std (..., 1); std is the root of the unbiased variance plus 1e-6.
    Source: the target of MAE, which the official MixMAE code keeps (unbiased variance included).
    """
    mean = patches.mean(dim=-1, keepdim=True)
    centred = patches - mean
    # torch's own var takes twenty times as long on a CPU
    variance = centred.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    std = (variance + VARIANCE_EPS).sqrt()
    return NormalisedPatches(centred.div_(std), mean, std)


def target_patches(images: Tensor, patch_px: int, *, normalise: bool) -> NormalisedPatches:
    """Cut images into the patches that a method predicts.

    Args: images: (B, C, H, W) float.  patch_px: side of a patch in pixels.  normalise: each patch; False leaves pixels.
    Returns: patches (B, L, P) float32, and mean and std (B, L, 1), which undo the normalisation: 0 and 1 without it.
    """
    patches = patchify(images.float(), patch_px)
    if normalise:
        return normalise_patches(patches)
    ones = torch.ones_like(patches[..., :1])
    return NormalisedPatches(patches, torch.zeros_like(ones), ones)


def draw_predictions(
    predicted: Tensor, target: NormalisedPatches, hidden: Tensor, patch_px: int, grid: tuple[int, int], normalised: bool
) -> dict[str, Tensor]:
    """Turn predicted patches into images, with no help from the pixels that were hidden.

    A normalised prediction becomes pixels through a mean and a std. A hidden patch gets those of the visible patches
    around it: with its own, a prediction of zero would already show the brightness of every hidden patch.

    Args:
        predicted: (..., L, P) float, in the units of target.
        target: of the same images, with mean and std (..., L, 1).
        hidden: (..., L) bool, True = hidden from the model.
        patch_px: side of a patch in pixels.
        grid: (rows, columns) of patches, with rows * columns = L.
        normalised: whether the target is.
    Returns: detached float32: reconstructions (..., C, H, W), the prediction at all patches, visible ones too; and if
        normalised, zero_predictions, of the same shape: what a prediction of zero would look like.
    """
    predicted = predicted.detach().float()
    if not normalised:
        return {"reconstructions": unpatchify(predicted, patch_px, grid)}
    mean, std = (interpolate_hidden(values, hidden, grid) for values in (target.mean, target.std))
    return {
        "reconstructions": unpatchify(predicted * std + mean, patch_px, grid),
        "zero_predictions": unpatchify(mean.expand_as(predicted), patch_px, grid),
    }


def interpolate_hidden(values: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace the values of hidden patches by means over the visible ones, weighted by 1 / distance^DISTANCE_POWER.

    Args:
        values: (..., L, n) float.
        hidden: (..., L) bool, True = hidden; leading sides as of values, or 1.
        grid: (rows, columns) of patches.
    Returns: (..., L, n).
    """
    sides = [torch.arange(side, device=values.device, dtype=values.dtype) for side in grid]
    places = torch.cartesian_prod(*sides)  # (L, 2)
    distance = torch.cdist(places, places).clamp(min=1.0)  # (L, L); a hidden patch is none of those that it averages
    weights = (~hidden)[..., None, :] / distance**DISTANCE_POWER  # (..., L, L)
    interpolated = weights @ values / weights.sum(dim=-1, keepdim=True)
    return torch.where(hidden[..., None], interpolated, values)
