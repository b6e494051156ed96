"""SimMIM: predict the pixels of hidden cells with one linear layer, from an encoder that reads mask tokens (CVPR 2022).

In the paper's order: draw cells to hide, encode with a learned token instead of their embedded patches, predict pixels,
compare the hidden ones.

Unusual, beside MixMAE and MAE: the encoder runs on all tokens, most of which are mask tokens, so most of its work is
spent on what it cannot see, and finetuning never shows it such tokens; any Encoder will do; the target is plain pixels,
under l1.

How the authors pretrain Swin-B (github.com/microsoft/SimMIM, configs and README; read 2026-11): images of 192 px,
RandomResizedCrop scale (0.67, 1), AdamW with betas (0.9, 0.999), weight decay 0.05, gradients clipped at norm 5, 10
warm-up epochs, batch 2048 (128 on each of 16 GPUs). 100 epochs: base lr 2e-4, cosine. 800 epochs: base lr 1e-4, divided
by 10 after 700. Their base lr is for a batch of 512, so 1e-4 peaks at 4e-4 (mmpretrain's configs spell that out; the
800-epoch figures are those of mmpretrain for Swin-B and of the authors for ViT-B).

Legend: B images, C channels, H W pixels, h w cells, s the encoder's last stride, L = (H/s)*(W/s) its last
tokens, D its last width, P = s*s*C values of the pixels under a token. `mask` is bool, True = removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixmae.decoders import PixelHead
from mixmae.encoders.base import BaseConfig, Encoder, TokenFill, check_images
from mixmae.layers.initialisation import TABLE_STD
from mixmae.machine import to_device
from mixmae.masking import hide, mask_pictures, masked_mean, masks_of_batch
from mixmae.mixing import cell_grid, tokens_per_cell, upsample_group_map
from mixmae.patches import NormalisedPatches, draw_predictions, target_patches
from mixmae.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig:
    """The objective; the defaults are those of SimMIM's code, whose cells are 32 px as ours for its encoders."""

    mask_ratio: float = 0.6
    """Share of the cells of each image that is hidden, rounded up to whole cells."""
    cell_px: int | None = None
    """Side of a mask cell in pixels, a multiple of the encoder's last stride; None: the encoder's own (its last stride,
    2 patches for a ViT)."""
    normalise_targets: bool = False
    """Predict the pixels under each token with zero mean and unit std, as MAE does."""
    images_mixed: ClassVar[int] = 1
    """The number that a batch must be a multiple of: images do not mix."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")

    def cell_px_on(self, encoder: Encoder | BaseConfig) -> int:
        """Side of a mask cell in pixels on an encoder, built or not."""
        return encoder.cell_px if self.cell_px is None else self.cell_px


class SimMIM(nn.Module):
    """The pretraining model: an encoder that is kept, a mask token and a linear head that are thrown away.

    Args:
        encoder: built.
        config: the objective.
    Raises: ValueError if the cells do not fit the encoder or its image size.
    """

    def __init__(self, encoder: Encoder, config: SimMIMConfig) -> None:
        super().__init__()
        self.stride = encoder.strides[-1]
        self.cell_px = config.cell_px_on(encoder)
        self.cell_tokens = tokens_per_cell(self.cell_px, self.stride)
        cell_grid(*encoder.image_size, self.cell_px)
        self.config = config
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty(encoder.fill_dim))
        nn.init.trunc_normal_(self.mask_token, std=TABLE_STD)
        self.decoder = PixelHead(encoder_dim=encoder.channels[-1], patch_px=self.stride, channels=encoder.in_channels)

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        first_sample: int = 0,
        with_pictures: bool = False,
    ) -> StepOutput:
        """Compute the loss on a batch of images.

        Args:
            images: (B, C, H, W) float, normalised; H and W multiples of cell_px.
            generator, mask, first_sample: see draw.
            with_pictures: also return what a panel is drawn from.
        Returns: the loss and, if asked for, the pictures of self.pictures.
        Raises: ValueError as draw.
        """
        mask = self.draw(images, generator, mask, first_sample)  # (B, h, w)
        encoded = self.encode(images, mask)  # (B, L, D)
        predicted, hidden = self.decode(encoded, mask)  # (B, L, P) and (B, L)
        target = self.targets(images)  # of (B, L, P)
        loss = self.reconstruction_loss(predicted, target.patches, hidden)
        pictures = self.pictures(images, mask, predicted, hidden, target) if with_pictures else {}
        return StepOutput(loss=loss, pictures=pictures)

    @torch.compiler.disable  # a generator cannot be part of a graph; all that follows is one
    def draw(
        self,
        images: Tensor,
        generator: torch.Generator | None,
        mask: Tensor | None = None,
        first_sample: int = 0,
    ) -> Tensor:
        """Draw which cells of each image are hidden, or check what the caller gives.

        Args:
            images: (B, C, H, W) float.
            generator: CPU generator; needed unless mask is given.
            mask: (B, h, w) or (1, h, w) bool, True = hidden, instead of drawing one per image.
            first_sample: index of the first image in the global batch, of which this may be a part: with the same
                generator, the parts together get the masks of the whole.
        Returns: (B, h, w) bool, on the device of images.
        Raises: ValueError if sides are no multiples of cell_px, the mask does not fit, or none can be drawn.
        """
        check_images(images, self.encoder.in_channels)
        mask = masks_of_batch(
            mask,
            num_samples=len(images),
            grid=cell_grid(images.shape[2], images.shape[3], self.cell_px),
            mask_ratio=self.config.mask_ratio,
            generator=generator,
            first_sample=first_sample,
        )
        return to_device((mask,), images.device)[0]

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encode images (B, C, H, W), with the mask token in hidden cells, to (B, L, D).

        Hidden pixels are blanked too. Where patches do not overlap that changes nothing; an encoder whose first layer
        reads across patches would otherwise see them.
        """
        return self.encoder(hide(images, mask), None, TokenFill(mask=mask, token=self.mask_token))

    def decode(self, encoded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the pixels under each token.

        Args: encoded: (B, L, D).  mask: (B, h, w) bool.
        Returns: the prediction (B, L, P), for visible tokens too; and (B, L) bool, True = hidden.
        """
        grid = (mask.shape[1] * self.cell_tokens, mask.shape[2] * self.cell_tokens)
        hidden = upsample_group_map(mask, grid).flatten(1)  # (B, L)
        return self.decoder(encoded), hidden

    def targets(self, images: Tensor) -> NormalisedPatches:
        """Cut images into the pixels under each token (B, L, P), float32, normalised if the config says so."""
        return target_patches(images, self.stride, normalise=self.config.normalise_targets)

    def reconstruction_loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Average the absolute error over the hidden pixels of all images.

        Args: predicted, target: (B, L, P).  mask: (B, L) bool.   Returns: float32 scalar.
        """
        return masked_mean((predicted.float() - target).abs().mean(dim=-1), mask)

    def pictures(
        self, images: Tensor, mask: Tensor, predicted: Tensor, hidden: Tensor, target: NormalisedPatches
    ) -> dict[str, Tensor]:
        """Collect what panels.reconstruction_panel draws: see masking.mask_pictures.

        The predictions are those of patches.draw_predictions; group_map has the grid of cells.
        """
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        drawn = draw_predictions(predicted, target, hidden, self.stride, grid, self.config.normalise_targets)
        return mask_pictures(images, drawn, mask)
