"""MixMAE: reconstruct K images at once from one image mixed of their visible cells (CVPR 2023, section 3).

In the paper's order: draw which image fills which cell, mix, encode with attention kept inside each image's cells,
decode each image from its own tokens, compare the cells that the mix did not show. Every ablation of the paper's
section 6 is a field of the config; the fills of Table 6 are in fills.py.

Unusual, beside MAE: the encoder sees no mask tokens; a batch of B images gives B mixes (each image is in K of them), so
an epoch costs B encoder runs and K*B runs of the small decoder; who mixes with whom is an explicit argument.

Legend: B images, M mixes (B by default), K images per mix, R of them reconstructed (K by default), n hidden tokens of
all of these in all mixes, H W pixels, h w mask cells, L tokens of the encoder's last stage (by default one per cell for
pyramids, 2 x 2 per cell for a ViT), D the encoder's last width, P = stride*stride*C values of the pixels under a token.
`group_map` and `partners` are explained in mixing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae import mixing
from mixmae.decoders import DecoderConfig, PixelDecoder
from mixmae.encoders.base import (
    BaseConfig,
    Encoder,
    MixEmbedding,
    MixEmbeddingEncoder,
    SortingEncoder,
    TokenFill,
    check_images,
)
from mixmae.layers.initialisation import TABLE_STD
from mixmae.machine import to_device
from mixmae.methods.fills import Fill, draw_fill, fill_hidden
from mixmae.mixing import cell_grid, check_group_map, hidden_mask, tokens_per_cell, upsample_group_map
from mixmae.patches import NormalisedPatches, draw_predictions, target_patches
from mixmae.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class MixMAEConfig:
    """The objective; the defaults are the paper's (section 4 and Tables 6 to 10)."""

    num_images: int = 4
    """Images per mix, 2 to 5: each shows 1/K of its cells, so K = 4 hides 75 %."""
    fill: Fill = "mix"
    """What stands in the cells that an image does not show (Table 6): other images, or, one image at a time, zeros, a
    mask token, its own hidden cells in another order, or an enlarged crop of itself. zero with masked attention is MAE
    on a pyramid (Table 2): the hidden cells are encoded, but nothing attends to them."""
    mask_token_share: float = 0.0
    """Share of a mix's cells that hold a mask token instead of an image: 0.5 with num_images 2 is the paper's "2 w/
    [MASK] (0.75)" (Table 8)."""
    dual: bool = True
    """Reconstruct all images of a mix; False reconstructs the first alone (Table 9)."""
    unmixing: Literal["attention", "embedding", "both", "none"] = "attention"
    """How the encoder tells the images of a mix apart (Table 10): masked self-attention, a mix embedding at the start
    of each stage, both, or not at all."""
    cell_px: int | None = None
    """Side of a mask cell in pixels, a multiple of the encoder's last stride; None: the encoder's own (its last stride,
    2 patches for a ViT: 32 px for the paper's encoders)."""
    group_map_per: Literal["batch", "sample"] = "batch"
    """Draw one group map for the whole batch, as the official code, or one per mix."""
    pairing: Literal["all", "once"] = "all"
    """all: each image is in K mixes, once in every group, as in the official code. once: in one mix, for 1/K of the
    encoder's work per image."""
    normalise_targets: bool = True
    """Predict the pixels of each patch with zero mean and unit std."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The size of the decoder."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices, value = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal and value not in choices:
                words = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
                raise ValueError(f"{name} must be {words}, got {value!r}")
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

    def cell_px_on(self, encoder: Encoder | BaseConfig) -> int:
        """Side of a mask cell in pixels on an encoder, built or not."""
        return encoder.cell_px if self.cell_px is None else self.cell_px

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
        """The number that a batch must be a multiple of: K, or 1 where images do not mix."""
        return self.num_images if self.fill == "mix" else 1


class Drawn(NamedTuple):
    """All that chance decides in a step, and what follows from that alone. It is made on the CPU, where the host sees
    it without waiting; its tensors are then on the device of the images."""

    group_map: Tensor
    """(M or 1, h, w) int64 in [0, K]. Cells of group r < R show the image partners[:, r]. Cells of other groups show
    nothing that is reconstructed: other images (dual=False: groups 1 to K - 1), mask tokens (mask_token_share: group
    K), or what fills the hidden cells of a single image (fill: group 1)."""
    partners: Tensor
    """(M, K) int64 in [0, B), or (M, 1) where images do not mix: the image in each group of each mix."""
    hidden: Tensor
    """(n,) int64: the tokens that are not visible, of all R*L tokens of all M mixes, in row order. Their pixels are
    compared."""
    sizes: tuple[int, ...]
    """Cells of the groups: mixing.group_sizes."""
    numbers: Tensor | None
    """What a fill draws (fills.py), on the CPU."""


class Mixed(NamedTuple):
    """What the encoder is given, and which images are to be reconstructed from it."""

    pixels: Tensor
    """(M, C, H, W)."""
    group_map: Tensor
    """As of Drawn."""
    partners: Tensor
    """(M, R) int64 in [0, B): the images to reconstruct from each mix."""
    hidden: Tensor
    """As of Drawn."""
    sizes: tuple[int, ...]
    """As of Drawn."""
    fill: TokenFill | None
    """Tokens that stand in cells of no image."""


class MixMAE(nn.Module):
    """The pretraining model: an encoder that is kept, and a decoder that is thrown away.

    Args:
        encoder: built.
        config: the objective.
    Raises: ValueError if the cells do not fit the encoder or its image size, or it cannot do what the config's unmixing
        needs.
    """

    def __init__(self, encoder: Encoder, config: MixMAEConfig) -> None:
        super().__init__()
        self.patch_px = encoder.strides[-1]
        self.cell_px = config.cell_px_on(encoder)
        self.cell_tokens = tokens_per_cell(self.cell_px, self.patch_px)
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
        self._takes_sizes = isinstance(encoder, SortingEncoder)
        self.decoder = PixelDecoder(
            encoder_dim=encoder.channels[-1],
            patch_px=self.patch_px,
            channels=encoder.in_channels,
            grid=self._token_grid(*cell_grid(*encoder.image_size, self.cell_px)),
            config=config.decoder,
        )
        groups = config.num_images + (config.mask_token_share > 0)
        self.mix_embeddings = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.empty(groups, width), std=TABLE_STD))
            for width in (encoder.channels if embeds else ())
        )
        self.mask_token: nn.Parameter | None = None
        if config.fill == "learnable" or config.mask_token_share:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(encoder.fill_dim), std=TABLE_STD))

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
            images: (B, C, H, W) float, normalised; H and W multiples of cell_px. Shuffled: neighbours mix.
            generator, group_map, partners, first_sample: see draw.
            with_pictures: also return what a panel is drawn from.
        Returns: the loss and, if asked for, the pictures of self.pictures.
        Raises: ValueError as draw.
        """
        mixed = self.mix(images, self.draw(images, generator, group_map, partners, first_sample))  # section 3.2
        encoded = self.encode(mixed)  # (M, L, D), section 3.3
        predicted = self.decode_hidden(encoded, mixed)  # (n, P)
        target = self.targets(images)  # of (B, L, P)
        loss = self.reconstruction_loss(predicted, self.hidden_targets(target, mixed))  # equation 2
        pictures = self.pictures(images, mixed, encoded, target) if with_pictures else {}
        return StepOutput(loss=loss, pictures=pictures)

    @torch.compiler.disable  # a generator cannot be part of a graph; all that follows is one
    def draw(
        self,
        images: Tensor,
        generator: torch.Generator | None,
        group_map: Tensor | None = None,
        partners: Tensor | None = None,
        first_sample: int = 0,
    ) -> Drawn:
        """Draw which image fills which cell of each mix, or check what the caller gives.

        Args:
            images: (B, C, H, W) float.
            generator: CPU generator; needed unless group_map is given, and by fill="shuffle" and "zoom".
            group_map: (M, h, w) or (1, h, w) int64 in [0, K), instead of drawing one; mask tokens are group K.
            partners: (M, K) int64 in [0, B), the image in each group of each mix, all different; default as the
                config's pairing says. (B, 1) where images do not mix.
            first_sample: index of the first image in the global batch, of which this may be a part: with the same
                generator, the parts together get the draws of the whole.
        Returns: the draws, and what they hide.
        Raises: ValueError if B is no multiple of K (with default partners), sides are no multiples of cell_px,
            shapes disagree, or there is no generator to draw from.
        """
        config = self.config
        check_images(images, self.encoder.in_channels)
        cells = cell_grid(images.shape[2], images.shape[3], self.cell_px)
        if partners is None:
            partners = mixing.cyclic_partners(len(images), config.images_mixed)
            partners = partners if config.pairing == "all" else partners[:: config.images_mixed]
        else:
            self._check_partners(partners)
        if group_map is None:
            if generator is None:
                raise ValueError("pass generator= (a CPU torch.Generator) to draw a group map, or pass group_map=")
            first_map = first_sample // config.num_images if config.pairing == "once" else first_sample
            num_maps = len(partners)
            if config.group_map_per == "batch":
                first_map, num_maps = 0, 1
            last_map = first_map + num_maps
            group_map = mixing.draw_group_map(cells, config.num_images, generator, last_map, config.mask_token_share)
            group_map = group_map[first_map:]
        check_group_map(group_map, num_mixes=len(partners), grid=cells)
        if config.fill != "mix":
            group_map = (group_map != 0).long()  # a single image, in group 0
        num_shown = partners.shape[1] if config.dual else 1
        groups = upsample_group_map(group_map, self._token_grid(*cells))
        hidden = hidden_mask(groups, num_shown).flatten(1).expand(len(partners), -1)  # (M, R*L)
        numbers = draw_fill(config.fill, len(images), cells, generator, first_sample)
        sizes = mixing.group_sizes(group_map)
        chosen = hidden.flatten().nonzero()[:, 0]
        group_map, partners, chosen = to_device((group_map, partners, chosen), images.device)
        return Drawn(group_map, partners, chosen, sizes, numbers)

    def mix(self, images: Tensor, drawn: Drawn) -> Mixed:
        """Fill the hidden cells of each image, with other images or (section 6) as the config's fill says.

        Args: images: (B, C, H, W) float.  drawn: of draw.
        """
        config, group_map = self.config, drawn.group_map
        fill = None
        if config.fill != "mix":
            token = images.new_zeros(self.encoder.fill_dim) if self.mask_token is None else self.mask_token
            pixels, fill = fill_hidden(config.fill, images, group_map != 0, drawn.numbers, token)
        else:
            if self.mask_token is not None:
                fill = TokenFill(mask=group_map == config.num_images, token=self.mask_token)
            # Cells of mask tokens get the pixels of the last image, which their token replaces.
            pixels = mixing.mix(images, group_map.clamp(max=config.num_images - 1), drawn.partners)
        partners = drawn.partners if config.dual else drawn.partners[:, :1]
        return Mixed(pixels, group_map, partners, drawn.hidden, drawn.sizes, fill)

    def encode(self, mixed: Mixed) -> Tensor:
        """Encode mixes to (M, L, D), each token from its own image alone where attention is masked."""
        group_map = mixed.group_map if self.config.masked_attention else None
        options: dict[str, Any] = {"sizes": mixed.sizes} if self._takes_sizes else {}
        if len(self.mix_embeddings):
            options["embedding"] = MixEmbedding(group_map=mixed.group_map, vectors=list(self.mix_embeddings))
        return self.encoder(mixed.pixels, group_map, mixed.fill, **options)

    def decode(self, encoded: Tensor, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Take each mix apart and predict every image from its own tokens.

        Args: encoded: (M, L, D).  mixed: what was encoded.
        Returns: the prediction (M, R, L, P), for visible tokens too; and (M or 1, R, L) bool, True = hidden.
        """
        hidden, grid = self._hidden(mixed)
        return self.decoder(encoded, hidden, grid), hidden

    def decode_hidden(self, encoded: Tensor, mixed: Mixed) -> Tensor:
        """Take each mix apart as decode does, but predict the hidden tokens alone: (n, P)."""
        return self.decoder(encoded, *self._hidden(mixed), mixed.hidden)

    def targets(self, images: Tensor) -> NormalisedPatches:
        """Cut images into patches (B, L, P), float32, normalised if the config says so; mean, std (B, L, 1) undo it."""
        return target_patches(images, self.patch_px, normalise=self.config.normalise_targets)

    def hidden_targets(self, target: NormalisedPatches, mixed: Mixed) -> Tensor:
        """What decode_hidden is to predict: (n, P) float32.   Args: target: of targets."""
        num_tokens = target.patches.shape[1]
        image = mixed.partners.flatten()[mixed.hidden // num_tokens]  # (n,) in [0, B)
        return target.patches.flatten(0, 1).index_select(0, image * num_tokens + mixed.hidden % num_tokens)

    def reconstruction_loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Average the squared error over the pixels of all hidden patches of all images in all mixes (equation 2).

        Args: predicted, target: (n, P).
        Returns: float32 scalar. For K = 2 and one map per batch it is the official loss.
        """
        return F.mse_loss(predicted.float(), target)

    def pictures(self, images: Tensor, mixed: Mixed, encoded: Tensor, target: NormalisedPatches) -> dict[str, Tensor]:
        """Collect what panels.reconstruction_panel draws.

        Returns: detached tensors:
            originals (B, C, H, W), as given;  mixed (M, C, H, W), with mask tokens and zeros as zeros;
            reconstructions and, under normalise_targets, zero_predictions (M, R, C, H, W): see
                patches.draw_predictions;
            group_map (M or 1, h, w) and partners (M, R), as of Mixed.
        """
        grid = self._token_grid(*mixed.group_map.shape[1:])
        predicted, hidden = self.decode(encoded, mixed)
        target = NormalisedPatches(*(values[mixed.partners] for values in target))  # of (M, R, L, P)
        seen = mixed.pixels.detach()
        if mixed.fill is not None:
            filled = upsample_group_map(mixed.fill.mask, (images.shape[2], images.shape[3]))
            seen = seen.masked_fill(filled[:, None], 0.0)
        return {
            "originals": images.detach(),
            "mixed": seen,
            **draw_predictions(predicted, target, hidden, self.patch_px, grid, self.config.normalise_targets),
            "group_map": mixed.group_map,
            "partners": mixed.partners,
        }

    def _hidden(self, mixed: Mixed) -> tuple[Tensor, tuple[int, int]]:
        """Which tokens of each image are hidden, (M or 1, R, L) bool, and the grid of these tokens."""
        grid = self._token_grid(*mixed.group_map.shape[1:])
        groups = upsample_group_map(mixed.group_map, grid)
        return hidden_mask(groups, mixed.partners.shape[1]).flatten(2), grid

    def _token_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """The grid of the encoder's last tokens for a grid of mask cells."""
        return rows * self.cell_tokens, columns * self.cell_tokens

    def _check_partners(self, partners: Tensor) -> None:
        num_images = self.config.images_mixed
        if partners.ndim != 2 or partners.shape[1] != num_images or partners.dtype != torch.int64:
            raise ValueError(
                f"partners must be int64 of shape (M, {num_images}), got {partners.dtype} of {tuple(partners.shape)}"
            )
        if partners.device.type == "cpu" and (partners.sort(dim=1).values.diff(dim=1) == 0).any():
            # The official code lets the middle image of an odd batch mix with itself. On a GPU the check would wait.
            raise ValueError("a mix has the same image twice, which shows its hidden cells: make partners distinct")
