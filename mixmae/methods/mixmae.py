"""MixMAE: reconstruct K images at once from one image mixed of their visible cells (CVPR 2023, section 3).

In the paper's order: draw which image fills which cell, mix, encode with attention kept inside each image's cells,
unmix, decode each image, compare the cells that the mix did not show. Every ablation of the paper's section 6 is a
field of the config.

Unusual, beside MAE: the encoder sees no mask tokens; a batch of B images gives B mixed ones (each image is in K of
them), so an epoch costs B encoder runs and K*B runs of the small decoder; who mixes with whom is an explicit argument.

Legend: B images, M mixes (B by default), K images in a mix, R of them reconstructed (K by default), H W pixels, h w
mask cells, L tokens of the encoder's last stage (one a cell for pyramids, 2 x 2 a cell for a ViT of 16 px patches), D
the encoder's last width, P = stride*stride*C values of a token's pixels. `group_map` and `partners` are explained in
mixing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mixmae.decoders import DecoderConfig, PixelDecoder
from mixmae.encoders.base import Encoder, MixEmbedding, MixEmbeddingEncoder, TokenFill, check_images, fill_dim
from mixmae.layers.initialisation import TABLE_STD
from mixmae.mixing import (
    MASK_UNIT_PX,
    cell_grid,
    check_group_map,
    cyclic_partners,
    draw_group_map,
    hidden_mask,
    mix,
    shuffle_cells,
    upsample_group_map,
    zoom_in,
)
from mixmae.patches import NormalisedPatches, target_patches, unpatchify
from mixmae.step import StepOutput

ZOOM_SCALES = (0.2, 0.8)
"""Smallest and largest side of the box that fill="zoom" enlarges, as a share of the image's. The paper gives none."""


@dataclass(frozen=True, kw_only=True)
class MixMAEConfig:
    """The objective; the defaults are the paper's (section 4 and Tables 6 to 10)."""

    num_images: int = 4
    """Images in a mix, 2 to 5: each shows 1/K of its cells, so K = 4 hides 75 %."""
    fill: Literal["mix", "zero", "learnable", "shuffle", "zoom"] = "mix"
    """What stands in the cells that an image does not show (Table 6): other images, or, one image at a time, zeros, a
    mask token, its own hidden cells in another order, or an enlarged crop of itself. zero with masked attention is MAE
    on a pyramid (Table 2): the hidden cells are encoded, but nothing sees them."""
    mask_token_share: float = 0.0
    """Share of a mix's cells that hold a mask token instead of an image: 0.5 with num_images 2 is the paper's "2 w/
    [MASK] (0.75)" (Table 8)."""
    dual: bool = True
    """Reconstruct all images of a mix; False reconstructs the first alone (Table 9)."""
    unmixing: Literal["attention", "embedding", "both", "none"] = "attention"
    """How the encoder tells the images of a mix apart (Table 10): masked self-attention, a mix embedding at the start
    of each stage, both, or not at all."""
    group_map_per: Literal["batch", "sample"] = "batch"
    """Draw one group map for the whole batch, as the official code, or one for each mix."""
    pairing: Literal["all", "once"] = "all"
    """all: each image is in K mixes, once in every group, as in the official code. once: in one mix, for 1/K of the
    encoder's work an image."""
    normalise_targets: bool = True
    """Predict the pixels of each patch with zero mean and unit deviation."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The size of the decoder."""

    def __post_init__(self) -> None:
        choices = {
            "fill": ("mix", "zero", "learnable", "shuffle", "zoom"),
            "unmixing": ("attention", "embedding", "both", "none"),
            "group_map_per": ("batch", "sample"),
            "pairing": ("all", "once"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                words = " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])])
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)!r}")
        if not 2 <= self.num_images <= 5:
            raise ValueError(f"num_images must be 2, 3, 4 or 5, got {self.num_images}")
        if not 0.0 <= self.mask_token_share < 1.0:
            raise ValueError(
                f"mask_token_share is a share of the cells, at least 0 and below 1; got {self.mask_token_share}"
            )
        if self.fill != "mix":
            if self.unmixing != "none" and (self.fill, self.unmixing) != ("zero", "attention"):
                raise ValueError(
                    f"fill={self.fill!r} fills the hidden cells of one image: with unmixing={self.unmixing!r} nothing "
                    "of the filling would reach it, and all fills would be the same; set unmixing='none', or "
                    "fill='zero' and unmixing='attention' for MAE on this encoder"
                )
            if self.mask_token_share or self.pairing != "all" or not self.dual:
                raise ValueError(
                    f"fill={self.fill!r} mixes no images: leave mask_token_share, pairing and dual at their defaults"
                )

    @property
    def masked_attention(self) -> bool:
        """Whether attention stays inside the cells of one image."""
        return self.unmixing in ("attention", "both")

    @property
    def mask_ratio(self) -> float:
        """Share of its cells that an image does not show."""
        return 1 - (1 - self.mask_token_share) / self.num_images

    @property
    def images_mixed(self) -> int:
        """Images that a batch must be a multiple of."""
        return self.num_images if self.fill == "mix" else 1


class Mixed(NamedTuple):
    """What the encoder is given, and what it is asked for."""

    pixels: Tensor
    """(M, C, H, W)."""
    group_map: Tensor
    """(M or 1, h, w) int64: r < R shows the r-th image to reconstruct; other groups are none of these."""
    partners: Tensor
    """(M, R) int64 in [0, B): the images to reconstruct from each mix."""
    fill: TokenFill | None
    """Tokens that stand in cells of no image."""


class MixMAE(nn.Module):
    """The pretraining model: an encoder that is kept, and a decoder that is thrown away.

    Args:
        encoder: built; its last stride divides the mask unit.
        config: the objective.
    Raises: ValueError if the encoder's last stride does not divide the mask unit, or it cannot do what the config's
        unmixing needs.
    """

    def __init__(self, encoder: Encoder, config: MixMAEConfig) -> None:
        super().__init__()
        self.patch_px = encoder.strides[-1]
        if MASK_UNIT_PX % self.patch_px:
            raise ValueError(
                f"MixMAE mixes cells of {MASK_UNIT_PX} px, but the encoder's last stride of {self.patch_px} px does "
                "not divide them"
            )
        if config.masked_attention and encoder.group_isolation == "none":
            raise ValueError("this encoder cannot keep groups apart: set unmixing='none', or another encoder")
        embeds = config.unmixing in ("embedding", "both")
        if embeds and not isinstance(encoder, MixEmbeddingEncoder):
            raise ValueError(
                f"unmixing={config.unmixing!r} needs an encoder that takes mix embeddings (Swin does), not "
                f"{type(encoder).__name__}: set unmixing='attention'"
            )
        self.config = config
        self.encoder = encoder
        self.decoder = PixelDecoder(
            encoder_dim=encoder.channels[-1],
            patch_px=self.patch_px,
            channels=encoder.in_channels,
            grid=self._token_grid(cell_grid(*encoder.image_size)),
            config=config.decoder,
        )
        groups = config.num_images + (config.mask_token_share > 0)
        self.mix_embeddings = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.empty(groups, width), std=TABLE_STD))
            for width in (encoder.channels if embeds else ())
        )
        self.mask_token: nn.Parameter | None = None
        if config.fill == "learnable" or config.mask_token_share:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(fill_dim(encoder)), std=TABLE_STD))

    def group_maps(
        self, num_mixes: int, grid: tuple[int, int], generator: torch.Generator, first_mix: int = 0
    ) -> Tensor:
        """Draw the group maps of a batch: (1, h, w) or (num_mixes, h, w) int64 on the CPU, as the config says.

        Cells of mask tokens are group K. A part of a global batch that starts at `first_mix` gets the maps that the
        whole batch would have there.
        """
        config = self.config
        if config.group_map_per == "batch":
            first_mix, num_mixes = 0, 1
        drawn = draw_group_map(grid, config.num_images, generator, first_mix + num_mixes, config.mask_token_share)
        return drawn[first_mix:]

    def mix(self, images: Tensor, group_map: Tensor, partners: Tensor, draws: Tensor | None = None) -> Mixed:
        """Fill the hidden cells (sections 3.2 and 6).

        Args:
            images: (B, C, H, W) float.
            group_map: (M or 1, h, w) int64.  partners: (M, K) int64.
            draws: (B, h*w) float in [0, 1), random numbers of fill="shuffle" and "zoom".
        """
        config = self.config
        if config.fill == "mix":
            shown = group_map.clamp(max=config.num_images - 1)
            fill = None
            if self.mask_token is not None:
                fill = TokenFill(cells=group_map == config.num_images, token=self.mask_token)
            reconstructed = partners if config.dual else partners[:, :1]
            return Mixed(mix(images, shown, partners), group_map, reconstructed, fill)
        binary = (group_map != 0).long()  # group 0 is the image, group 1 what stands for its hidden cells
        hidden = binary.bool()
        fill, pixels = None, images
        if config.fill == "zero":
            fill = TokenFill(cells=hidden, token=images.new_zeros(fill_dim(self.encoder)))
        elif config.fill == "learnable":
            assert self.mask_token is not None
            fill = TokenFill(cells=hidden, token=self.mask_token)
        else:
            assert draws is not None, "shuffle and zoom draw"
            if config.fill == "shuffle":
                pixels = shuffle_cells(images, hidden, draws)
            else:
                low, high = ZOOM_SCALES
                boxes = torch.stack([low + (high - low) * draws[:, 0], draws[:, 1], draws[:, 2]], dim=1)
                covered = upsample_group_map(hidden, (images.shape[2], images.shape[3]))[:, None]
                pixels = torch.where(covered, zoom_in(images, boxes), images)
        return Mixed(pixels, binary, partners[:, :1], fill)

    def encode(self, mixed: Mixed) -> Tensor:
        """Encode mixed images to (M, L, D), each token from its own image alone where attention is masked."""
        group_map = mixed.group_map if self.config.masked_attention else None
        if len(self.mix_embeddings):
            assert isinstance(self.encoder, MixEmbeddingEncoder)
            embedding = MixEmbedding(group_map=mixed.group_map, vectors=list(self.mix_embeddings))
            return self.encoder(mixed.pixels, group_map, mixed.fill, embedding)
        return self.encoder(mixed.pixels, group_map, mixed.fill)

    def targets(self, images: Tensor) -> NormalisedPatches:
        """Cut images into patches (B, L, P), float32, normalised if the config says so; mean, std (B, L, 1) undo it."""
        return target_patches(images, self.patch_px, normalise=self.config.normalise_targets)

    def reconstruction_loss(self, predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        """Average the squared error over the pixels of all hidden patches of all images in all mixes (equation 2).

        Args:
            predicted, target: (M, R, L, P).
            hidden: (M, R, L) or (1, R, L) bool.
        Returns: float32 scalar. For K = 2 and one map a batch it is the official loss.
        """
        error = (predicted.float() - target).square().mean(dim=-1)  # (M, R, L)
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
            generator: CPU generator that the group map is drawn from; needed unless group_map is given, and by
                fill="shuffle" and "zoom".
            group_map: (M, h, w) or (1, h, w) int64 in [0, K), instead of drawing one.
            partners: (M, K) int64 in [0, B), the image in each group of each mix; default as the config's pairing
                says.
            first_sample: place of this batch's first image in the global batch, of which it may be a part: with the
                same generator, the parts together get the group maps of the whole.
            with_pictures: also return what a panel is drawn from.
        Returns: the loss and, if asked for, detached pictures:
            originals (B, C, H, W), as given;  mixed (M, C, H, W), with mask tokens and zeros as zeros;
            reconstructions (M, R, C, H, W): the prediction at all cells, visible ones too, in the units of images.
                Under normalise_targets it is un-normalised with the mean and std of each TARGET patch, which the model
                has not predicted: brightness and contrast of hidden patches are given away;
            group_map (M or 1, h, w);  partners (M, R).
        Raises: ValueError if B is no multiple of K (with default partners), sides are no multiples of 32, or shapes
            disagree.
        """
        num_images = self.config.num_images
        check_images(images, self.encoder.in_channels)
        cells = cell_grid(images.shape[2], images.shape[3])
        partners = self._partners(images, partners)
        if group_map is None:
            if generator is None:
                raise ValueError("pass generator= (a CPU torch.Generator) to draw a group map, or pass group_map=")
            first_mix = first_sample // num_images if self.config.pairing == "once" else first_sample
            group_map = self.group_maps(len(partners), cells, generator, first_mix)
        check_group_map(group_map, num_mixes=len(partners), grid=cells)
        draws = self._draws(images, generator, first_sample)

        mixed = self.mix(images, group_map.to(images.device), partners.to(images.device), draws)
        encoded = self.encode(mixed)  # (M, L, D)
        grid, shown = self._token_grid(cells), mixed.partners.shape[1]
        token_map = upsample_group_map(mixed.group_map, grid)
        hidden = hidden_mask(token_map, shown).flatten(2)  # (M or 1, R, L)
        predicted = self.decoder(encoded, hidden, grid)  # (M, R, L, P)
        target = self.targets(images)  # (B, L, P)
        loss = self.reconstruction_loss(predicted, target.patches[mixed.partners], hidden)
        if not with_pictures:
            return StepOutput(loss=loss)
        pixels = predicted.detach().float() * target.std[mixed.partners] + target.mean[mixed.partners]
        seen = mixed.pixels.detach()
        if mixed.fill is not None:
            covered = upsample_group_map(mixed.fill.cells, (images.shape[2], images.shape[3]))
            seen = seen.masked_fill(covered[:, None], 0.0)
        pictures = {
            "originals": images.detach(),
            "mixed": seen,
            "reconstructions": unpatchify(pixels, self.patch_px, grid),
            "group_map": mixed.group_map,
            "partners": mixed.partners,
        }
        return StepOutput(loss=loss, pictures=pictures)

    def _token_grid(self, cells: tuple[int, int]) -> tuple[int, int]:
        """The grid of the encoder's last tokens for a grid of mask cells."""
        tokens = MASK_UNIT_PX // self.patch_px
        return cells[0] * tokens, cells[1] * tokens

    def _draws(self, images: Tensor, generator: torch.Generator | None, first_sample: int) -> Tensor | None:
        """Random numbers of the fills that need them, (B, h*w); a part of a batch gets those of the whole."""
        if self.config.fill not in ("shuffle", "zoom"):
            return None
        if generator is None:
            raise ValueError(f"fill={self.config.fill!r} draws random numbers: pass generator= (a CPU torch.Generator)")
        rows, columns = cell_grid(images.shape[2], images.shape[3])
        numbers = max(3, rows * columns)  # a box takes three
        return torch.rand(first_sample + len(images), numbers, generator=generator)[first_sample:]

    def _partners(self, images: Tensor, partners: Tensor | None) -> Tensor:
        """Check who mixes with whom, or pair as the config says: (M, K) int64, or (B, 1) where images do not mix."""
        num_images = self.config.images_mixed
        if partners is None:
            partners = cyclic_partners(len(images), num_images)
            return partners if self.config.pairing == "all" else partners[::num_images]
        if partners.ndim != 2 or partners.shape[1] != num_images or partners.dtype != torch.int64:
            raise ValueError(
                f"partners must be int64 of shape (M, {num_images}), got {partners.dtype} of {tuple(partners.shape)}"
            )
        if partners.device.type == "cpu" and (partners.sort(dim=1).values.diff(dim=1) == 0).any():
            # The official code lets the middle image of an odd batch mix with itself. On a GPU the check would wait.
            raise ValueError("a mix has the same image twice, which shows its hidden cells: make partners distinct")
        return partners
