"""What the hidden cells of an image show instead of other images: the ablations of MixMAE's Table 6 (paper section 6).

Legend: B images, C channels, H W pixels, h w mask cells, L = h*w. `mask` is bool, True = hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mixmae.encoders.base import TokenFill
from mixmae.mixing import upsample_group_map

Fill = Literal["mix", "zero", "learnable", "shuffle", "zoom"]
"""mix: other images (the method itself). zero: zeros instead of tokens. learnable: a mask token. shuffle: the image's
own hidden cells in another order. zoom: an enlarged crop of the image."""

ZOOM_SCALES = (0.2, 0.8)
"""Smallest and largest side of the box that fill="zoom" enlarges, as a share of the image's. The paper gives none."""


def draw_fill(
    fill: Fill, num_samples: int, cells: tuple[int, int], generator: torch.Generator | None, first_sample: int
) -> Tensor | None:
    """Draw the random numbers that a fill needs. A part of a batch gets those of the whole.

    Args:
        num_samples: B.  cells: (h, w).  generator: on the CPU.
        first_sample: index of the first image in the global batch.
    Returns: (B, L) float in [0, 1) on the CPU, at least three per image; None for fills that draw nothing.
    Raises: ValueError if there is no generator to draw from.
    """
    if fill not in ("shuffle", "zoom"):
        return None
    if generator is None:
        raise ValueError(f"fill={fill!r} draws random numbers: pass generator= (a CPU torch.Generator)")
    numbers = max(3, cells[0] * cells[1])  # a box takes three
    return torch.rand(first_sample + num_samples, numbers, generator=generator)[first_sample:]


def fill_hidden(
    fill: Fill, images: Tensor, mask: Tensor, draws: Tensor | None, token: Tensor
) -> tuple[Tensor, TokenFill | None]:
    """Fill the hidden cells of images.

    Args:
        fill: any but "mix".
        images: (B, C, H, W) float.
        mask: (B, h, w) or (1, h, w) bool, True = hidden.
        draws: of draw_fill.
        token: (encoder.fill_dim,), zeros or the mask token, for the fills that replace tokens.
    Returns: the pixels (B, C, H, W) for the encoder, and the tokens that it shall replace, or None.
    """
    if fill in ("zero", "learnable"):
        return images, TokenFill(mask=mask, token=token)
    assert draws is not None, "shuffle and zoom draw"
    if fill == "shuffle":
        return shuffle_cells(images, mask, draws), None
    low, high = ZOOM_SCALES
    boxes = torch.stack([low + (high - low) * draws[:, 0], draws[:, 1], draws[:, 2]], dim=1)
    hidden = upsample_group_map(mask, (images.shape[2], images.shape[3]))[:, None]
    return torch.where(hidden, zoom_in(images, boxes), images), None


def shuffle_cells(images: Tensor, mask: Tensor, sort_keys: Tensor) -> Tensor:
    """Permute the hidden cells of each image among themselves.

    Args:
        images: (B, C, H, W), any dtype.
        mask: (B, h, w) or (1, h, w) bool, True = hidden; the other cells stay.
        sort_keys: (B, L) random floats; the argsort of those of the hidden cells is the permutation.
    Returns: (B, C, H, W), dtype of images.
    Source: paper section 6, "Shuffle".
    """
    batch, channels, height, width = images.shape
    rows, columns = mask.shape[1:]
    hidden = mask.flatten(1).expand(batch, -1)  # (B, L)
    # The n-th hidden cell, in row order, gets the hidden cell with the n-th smallest key.
    order = sort_keys.to(images.device).masked_fill(~hidden, float("inf")).argsort(dim=1)  # (B, L), hidden cells first
    rank = hidden.cumsum(dim=1) - 1
    own = torch.arange(rows * columns, device=images.device).expand(batch, -1)
    source = torch.where(hidden, order.gather(1, rank.clamp(min=0)), own)  # (B, L)
    up, across = height // rows, width // columns
    patches = images.view(batch, channels, rows, up, columns, across).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    patches = patches.gather(1, source[:, :, None, None, None].expand_as(patches))  # (B, L, C, up, across)
    patches = patches.view(batch, rows, columns, channels, up, across)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def zoom_in(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop a box of each image and enlarge it to the image's size, bilinear.

    Args:
        images: (B, C, H, W) float.
        boxes: (B, 3) float: the side of the box as a share of the image's, in (0, 1]; then top and left, 0 = touching
            that side of the image, 1 = touching the opposite side.
    Returns: (B, C, H, W), dtype of images.
    Source: paper section 6, "Zoomin", which gives no scale.
    """
    scale, top, left = boxes.to(images.device, images.dtype).unbind(1)  # (B,)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    # In sampling coordinates, -1 to 1, the box's centre moves within 1 - scale of the image's.
    theta[:, 0, 2], theta[:, 1, 2] = (2 * left - 1) * (1 - scale), (2 * top - 1) * (1 - scale)
    sampling = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, sampling, mode="bilinear", padding_mode="border", align_corners=False)
