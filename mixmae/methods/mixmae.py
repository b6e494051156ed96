"""MixMAE: reconstruct K images at once from one image mixed of their visible cells (CVPR 2023, section 3).

In the paper's order: draw which image fills which cell, mix, encode with attention kept inside each image's cells,
unmix, decode each image, compare the cells that the mix did not show.

Unusual, beside MAE: the encoder sees no mask tokens; a batch of B images gives B mixed ones (each image is in K of
them), so an epoch costs B encoder runs and K*B runs of the small decoder; who mixes with whom is an explicit argument.

Legend: B images, M mixes (B by default), K images in a mix, H W pixels, h w cells, L = h*w, C channels, D the encoder's
last width, P = unit*unit*C values of a cell's pixels. `group_map` and `partners` are explained in mixing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mixmae.decoders import DecoderConfig, PixelDecoder
from mixmae.encoders.base import Encoder, check_images
from mixmae.mixing import (
    MASK_UNIT_PX,
    cell_grid,
    check_group_map,
    cyclic_partners,
    draw_group_map,
    hidden_mask,
    mix,
)
from mixmae.patches import NormalisedPatches, target_patches, unpatchify
from mixmae.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class MixMAEConfig:
    """The objective; the defaults are the paper's (section 4 and Tables 6 to 10)."""

    num_images: int = 4
    """Images in a mix, 2 to 5: each shows 1/K of its cells, so K = 4 hides 75 %."""
    group_map_per: Literal["batch", "sample"] = "batch"
    """Draw one group map for the whole batch, as the official code, or one for each mix."""
    masked_attention: bool = True
    """Keep attention inside the cells of one image (section 3.3)."""
    normalise_targets: bool = True
    """Predict the pixels of each cell with zero mean and unit deviation."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The size of the decoder."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_images <= 5:
            raise ValueError(f"num_images must be 2, 3, 4 or 5, got {self.num_images}")
        if self.group_map_per not in ("batch", "sample"):
            raise ValueError(f"group_map_per must be 'batch' or 'sample', got {self.group_map_per!r}")


class MixMAE(nn.Module):
    """The pretraining model: an encoder that is kept, and a decoder that is thrown away.

    Args:
        encoder: built; its last stride is the mask unit.
        config: the objective.
    Raises: ValueError if the encoder's last stride is not the mask unit, or it cannot keep groups apart when it must.
    """

    def __init__(self, encoder: Encoder, config: MixMAEConfig) -> None:
        super().__init__()
        if encoder.strides[-1] != MASK_UNIT_PX:
            raise ValueError(
                f"MixMAE mixes cells of {MASK_UNIT_PX} px, but the encoder's last stride is {encoder.strides[-1]} px"
            )
        if config.masked_attention and encoder.group_isolation == "none":
            raise ValueError("this encoder cannot keep groups apart: set masked_attention=False")
        self.config = config
        self.encoder = encoder
        self.decoder = PixelDecoder(
            encoder_dim=encoder.channels[-1],
            patch_px=MASK_UNIT_PX,
            channels=encoder.in_channels,
            grid=cell_grid(*encoder.image_size),
            config=config.decoder,
        )

    def group_maps(
        self, num_mixes: int, grid: tuple[int, int], generator: torch.Generator, first_sample: int = 0
    ) -> Tensor:
        """Draw the group maps of a batch: (1, h, w) or (num_mixes, h, w) int64 on the CPU, as the config says.

        A part of a global batch that starts at `first_sample` gets the maps that the whole batch would have there.
        """
        if self.config.group_map_per == "batch":
            return draw_group_map(grid, self.config.num_images, generator)
        return draw_group_map(grid, self.config.num_images, generator, first_sample + num_mixes)[first_sample:]

    def encode(self, mixed: Tensor, group_map: Tensor) -> Tensor:
        """Encode mixed images (M, C, H, W) to (M, L, D), each cell from its own image alone (section 3.3)."""
        return self.encoder(mixed, group_map if self.config.masked_attention else None)

    def targets(self, images: Tensor) -> NormalisedPatches:
        """Cut images into cells (B, L, P), float32, normalised if the config says so; mean, std (B, L, 1) undo it."""
        return target_patches(images, MASK_UNIT_PX, normalise=self.config.normalise_targets)

    def reconstruction_loss(self, predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        """Average the squared error over the pixels of all hidden cells of all images in all mixes (equation 2).

        Args:
            predicted, target: (M, K, L, P).
            hidden: (M, K, L) or (1, K, L) bool.
        Returns: float32 scalar. For K = 2 and one map a batch it is the official loss.
        """
        error = (predicted.float() - target).square().mean(dim=-1)  # (M, K, L)
        weight = hidden.expand_as(error).float()
        return (error * weight).sum() / weight.sum()

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        group_map: Tensor | None = None,
        partners: Tensor | None = None,
        first_sample: int = 0,
        with_pictures: bool = False,
    ) -> StepOutput:
        """Compute the loss on a batch of images.

        Args:
            images: (B, C, H, W) float, normalised; H and W multiples of 32. Shuffled: neighbours mix.
            generator: CPU generator that the group map is drawn from; needed unless group_map is given.
            group_map: (M, h, w) or (1, h, w) int64 in [0, K), instead of drawing one.
            partners: (M, K) int64 in [0, B), the image in each group of each mix; default cyclic_partners(B, K).
            first_sample: place of this batch's first mix in the global batch, of which it may be a part: with the same
                generator, the parts together get the group maps of the whole.
            with_pictures: also return what a panel is drawn from.
        Returns: the loss and, if asked for, detached pictures:
            originals (B, C, H, W), as given;  mixed (M, C, H, W);
            reconstructions (M, K, C, H, W): the prediction at all cells, visible ones too, in the units of images.
                Under normalise_targets it is un-normalised with the mean and std of each TARGET cell, which the model
                has not predicted: brightness and contrast of hidden cells are given away;
            group_map (M or 1, h, w);  partners (M, K).
        Raises: ValueError if B is no multiple of K (with default partners), sides are no multiples of 32, or shapes
            disagree.
        """
        grid, group_map, partners = self._prepare(images, generator, group_map, partners, first_sample)
        mixed = mix(images, group_map, partners)  # (M, C, H, W)
        encoded = self.encode(mixed, group_map)  # (M, L, D)
        hidden = hidden_mask(group_map, self.config.num_images).flatten(2)  # (M or 1, K, L)
        predicted = self.decoder(encoded, hidden, grid)  # (M, K, L, P)
        target = self.targets(images)  # (B, L, P)
        loss = self.reconstruction_loss(predicted, target.patches[partners], hidden)
        if not with_pictures:
            return StepOutput(loss=loss)
        pixels = predicted.detach().float() * target.std[partners] + target.mean[partners]
        pictures = {
            "originals": images.detach(),
            "mixed": mixed.detach(),
            "reconstructions": unpatchify(pixels, MASK_UNIT_PX, grid),
            "group_map": group_map,
            "partners": partners,
        }
        return StepOutput(loss=loss, pictures=pictures)

    def _prepare(
        self,
        images: Tensor,
        generator: torch.Generator | None,
        group_map: Tensor | None,
        partners: Tensor | None,
        first_sample: int,
    ) -> tuple[tuple[int, int], Tensor, Tensor]:
        """Check the inputs, fill in the defaults, and bring the group map and the partners to the images' device."""
        num_images = self.config.num_images
        check_images(images, self.encoder.in_channels)
        grid = cell_grid(images.shape[2], images.shape[3])
        if partners is None:
            partners = cyclic_partners(len(images), num_images)
        elif partners.ndim != 2 or partners.shape[1] != num_images or partners.dtype != torch.int64:
            raise ValueError(
                f"partners must be int64 of shape (M, {num_images}), got {partners.dtype} of {tuple(partners.shape)}"
            )
        elif partners.device.type == "cpu" and (partners.sort(dim=1).values.diff(dim=1) == 0).any():
            # The official code lets the middle image of an odd batch mix with itself. On a GPU the check would wait.
            raise ValueError("a mix has the same image twice, which shows its hidden cells: make partners distinct")
        if group_map is None:
            if generator is None:
                raise ValueError("pass generator= (a CPU torch.Generator) to draw a group map, or pass group_map=")
            group_map = self.group_maps(len(partners), grid, generator, first_sample)
        check_group_map(group_map, num_mixes=len(partners), grid=grid)
        return grid, group_map.to(images.device), partners.to(images.device)
