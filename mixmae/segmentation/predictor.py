"""A trained UPerNet as others use it: images in, classes of pixels out.

Legend: B images, C channels, H W pixels, N classes, h w the first stage's grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmae.pixels import normalise
from mixmae.segmentation.upernet import UPerNet, resized


class PixelClasses(nn.Module):
    """A UPerNet with the classes that it finds: normalised (B, C, H, W) -> scores (B, N, h, w), classes (B, H, W)."""

    def __init__(self, model: UPerNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.model(images)
        return scores, resized(scores, images.shape[-2:]).argmax(dim=1)


class PixelPredictor(nn.Module):
    """A UPerNet for images as they come from a file: uint8 pixels to the class of each.

    Args: model: a UPerNet.  mean, std: of the pixel normalisation, in units of 0..1, one value per channel.
    """

    def __init__(self, model: UPerNet, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = PixelClasses(model)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of the size of the model's windows -> (B, H, W) uint8, indices of classes."""
        return self.model(normalise(images, mean=self.mean, std=self.std))[1].to(torch.uint8)
