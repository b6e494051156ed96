"""A mask of a box, as a model gives it, on the image.

Legend: S side of a mask, h w an image's size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

THRESHOLD = 0.5


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resample one mask where its box is, one at a time, so that memory is one image's, not a hundred's.

    Args: mask: (S, S) float32, probabilities.  box: (4,) in pixels of the image, of any fraction.  size: (h, w).
    Returns: (h, w) bool: pixels whose centre is inside with a probability of at least THRESHOLD.
    """
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    right, bottom = min(width, math.ceil(x1)), min(height, math.ceil(y1))
    whole = np.zeros(size, dtype=np.bool_)
    if right <= left or bottom <= top or x1 <= x0 or y1 <= y0:
        return whole
    device = mask.device
    # Centres of pixels, in [-1, 1] over the box.
    x = (torch.arange(left, right, device=device) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, bottom, device=device) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (rows, columns, 2)
    read = F.grid_sample(mask.float()[None, None], grid[None].float(), align_corners=False)
    whole[top:bottom, left:right] = (read[0, 0] >= THRESHOLD).cpu().numpy()
    return whole
