"""MAE: encode the visible quarter of an image's patches, and predict the rest with a small decoder (CVPR 2022).

In the paper's order: draw patches to hide, encode the visible ones as if there were no others, put mask tokens in the
gaps and decode all, compare the hidden ones.

Unusual, beside MixMAE and SimMIM: the encoder is cheap, because hidden patches never enter it, so it must be able to
run on any subset of its tokens: a plain ViT can, a pyramid cannot. A mask cell is one patch by default. MAE's own
decoder carries the encoder's class token along; ours does not, and has the same parameters nevertheless.

How the authors pretrain (the paper, appendix A; github.com/facebookresearch/mae, PRETRAIN.md; read 2026-11): images of
224 px, RandomResizedCrop and flip, AdamW with betas (0.9, 0.95), base lr 1.5e-4 for a batch of 256, weight decay 0.05,
batch 4096, 40 warm-up epochs, cosine, 800 or 1600 epochs.

Legend: B images, C channels, H W pixels, h w mask cells, L patches, n visible ones of an image, s the side of a patch
in pixels, D the encoder's width, P = s*s*C values of a patch. `mask` is bool, True = removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixmae.decoders import DecoderConfig, PixelDecoder
from mixmae.encoders.base import BaseConfig, Encoder, SequenceEncoder, check_images
from mixmae.machine import to_device
from mixmae.masking import mask_pictures, masked_mean, masks_of_batch, place_tokens, visible_cells
from mixmae.mixing import cell_grid, tokens_per_cell, upsample_group_map
from mixmae.patches import NormalisedPatches, draw_predictions, target_patches
from mixmae.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """The objective; the defaults are the paper's."""

    mask_ratio: float = 0.75
    """Share of the cells of each image that is hidden, rounded up to whole cells."""
    cell_px: int | None = None
    """Side of a mask cell in pixels, a multiple of the encoder's patches; None: one patch."""
    normalise_targets: bool = True
    """Predict the pixels of each patch with zero mean and unit std."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The size of the decoder; MAE's is that of MixMAE."""
    images_mixed: ClassVar[int] = 1
    """The number that a batch must be a multiple of: images do not mix."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")

    def cell_px_on(self, encoder: Encoder | BaseConfig) -> int:
        """Side of a mask cell in pixels on an encoder, built or not."""
        return encoder.strides[-1] if self.cell_px is None else self.cell_px


class MAE(nn.Module):
    """The pretraining model: an encoder that is kept, and a decoder that is thrown away.

    Args:
        encoder: built, and a SequenceEncoder.
        config: the objective.
    Raises: ValueError if the encoder cannot run on a part of its tokens, or the cells do not fit it or its image size.
    """

    def __init__(self, encoder: Encoder, config: MAEConfig) -> None:
        super().__init__()
        if not isinstance(encoder, SequenceEncoder):
            raise ValueError(
                f"MAE encodes visible patches alone, which {type(encoder).__name__} cannot: use a plain ViT, or "
                "pretrain this encoder with MixMAE or SimMIM"
            )
        self.stride = encoder.strides[-1]
        self.cell_px = config.cell_px_on(encoder)
        self.cell_tokens = tokens_per_cell(self.cell_px, self.stride)
        self.config = config
        self.encoder = encoder
        self.decoder = PixelDecoder(
            encoder_dim=encoder.channels[-1],
            patch_px=self.stride,
            channels=encoder.in_channels,
            grid=self._patch_grid(*cell_grid(*encoder.image_size, self.cell_px)),
            config=config.decoder,
        )

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
        mask, visible = self.draw(images, generator, mask, first_sample)  # (B, h, w) and (B, n)
        encoded = self.encode(images, visible)  # (B, L, D)
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
    ) -> tuple[Tensor, Tensor]:
        """Draw which cells of each image are hidden, or check what the caller gives.

        Args:
            images: (B, C, H, W) float.
            generator: CPU generator; needed unless mask is given.
            mask: (B, h, w) or (1, h, w) bool, True = hidden, instead of drawing one per image. All images must keep
                equally many cells.
            first_sample: index of the first image in the global batch, of which this may be a part: with the same
                generator, the parts together get the masks of the whole.
        Returns: the mask (B, h, w) bool and the visible patches (B, n) int64 in [0, L), on the device of images.
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
        visible = visible_cells(self._patch_mask(mask))  # where the mask was drawn: a GPU would wait
        mask, visible = to_device((mask, visible), images.device)
        return mask, visible

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode the visible patches (B, n) of images to (B, L, D), each at its position, with zeros in the gaps."""
        num_patches = images.shape[2] * images.shape[3] // self.stride**2
        return place_tokens(self.encoder.encode_visible(images, visible), visible, num_patches)

    def decode(self, encoded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put mask tokens in the gaps and predict every patch.

        Args: encoded: (B, L, D).  mask: (B, h, w) bool.
        Returns: the prediction (B, L, P), for visible patches too; and (B, L) bool, True = hidden.
        """
        patches = self._patch_mask(mask)
        hidden = patches.flatten(1)  # (B, L)
        return self.decoder(encoded, hidden[:, None], (patches.shape[1], patches.shape[2]))[:, 0], hidden

    def targets(self, images: Tensor) -> NormalisedPatches:
        """Cut images into patches (B, L, P), float32, normalised if the config says so."""
        return target_patches(images, self.stride, normalise=self.config.normalise_targets)

    def reconstruction_loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Average the squared error over the pixels of the hidden patches of all images.

        Args: predicted, target: (B, L, P).  mask: (B, L) bool.   Returns: float32 scalar.
        """
        return masked_mean((predicted.float() - target).square().mean(dim=-1), mask)

    def pictures(
        self, images: Tensor, mask: Tensor, predicted: Tensor, hidden: Tensor, target: NormalisedPatches
    ) -> dict[str, Tensor]:
        """Collect what panels.reconstruction_panel draws: see masking.mask_pictures.

        The predictions are those of patches.draw_predictions; group_map has the grid of patches.
        """
        grid = self._patch_grid(mask.shape[1], mask.shape[2])
        drawn = draw_predictions(predicted, target, hidden, self.stride, grid, self.config.normalise_targets)
        return mask_pictures(images, drawn, mask)

    def _patch_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """The grid of patches for a grid of cells."""
        return rows * self.cell_tokens, columns * self.cell_tokens

    def _patch_mask(self, mask: Tensor) -> Tensor:
        """The mask (B, h, w) of cells at the grid of patches."""
        return upsample_group_map(mask, self._patch_grid(mask.shape[1], mask.shape[2]))
