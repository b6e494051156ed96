"""Tiny things for tests: a model that runs in milliseconds, images of noise, group maps."""

import torch
from torch import Tensor, nn

from mixmae.decoders import DecoderConfig
from mixmae.encoders.base import GroupIsolation, check_images, fill_tokens
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.layers.blocks import SelfAttention, TransformerBlock
from mixmae.layers.patch_embed import PatchEmbed
from mixmae.layers.positions import sin_cos_positions
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.mixing import cell_grid, draw_group_map


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_swin(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> SwinEncoder:
    """A Swin of 0.4 M parameters; at 96 px stages 1 and 2 have 4 windows each, across mask cells (padded in 2)."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=image_size,
        in_channels=in_channels,
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_sizes=(12, 7, 6, 3),
    )
    return SwinEncoder(config)


def tiny_mixmae(
    image_size: int | tuple[int, int] = 96,
    in_channels: int = 3,
    **options: object,
) -> MixMAE:
    """A MixMAE on tiny_swin; options are fields of MixMAEConfig."""
    config = MixMAEConfig(decoder=DecoderConfig(dim=32, depth=1, num_heads=4), **options)  # type: ignore[arg-type]
    return MixMAE(tiny_swin(image_size, in_channels), config)


class SequenceViT(nn.Module):
    """A plain ViT without a class token: the smallest SequenceEncoder."""

    group_isolation: GroupIsolation = "none"
    strides = (16,)

    def __init__(self, image_size=(96, 96), in_channels=3, dim=32, depth=2, num_heads=4):
        super().__init__()
        self.image_size, self.in_channels, self.channels, self.num_blocks = image_size, in_channels, (dim,), depth
        self.patch_embed = PatchEmbed(in_channels, dim, 16)
        blocks = (TransformerBlock(dim, SelfAttention(dim, num_heads), mlp_ratio=4.0) for _ in range(depth))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim)

    def embed(self, images, fill=None):
        check_images(images, self.in_channels)
        cell_grid(images.shape[2], images.shape[3])
        x = fill_tokens(self.patch_embed(images), fill).flatten(1, 2)
        return x + sin_cos_positions(x.shape[2], (images.shape[2] // 16, images.shape[3] // 16), device=x.device)

    def encode_visible(self, images, visible):
        x = self.embed(images)
        return self.norm(self.blocks(x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))))

    def features(self, images, group_map=None, fill=None):
        if group_map is not None:
            raise ValueError("this encoder takes no group map")
        grid = (images.shape[2] // 16, images.shape[3] // 16)
        return [self.blocks(self.embed(images, fill)).transpose(1, 2).unflatten(2, grid)]

    def forward(self, images, group_map=None, fill=None):
        return self.norm(self.features(images, group_map, fill)[0].flatten(2).transpose(1, 2))

    def parameter_depths(self, rule="official"):
        place = {"patch_embed": 0, "norm": self.num_blocks}
        parts = ((name, name.split(".")) for name, _ in self.named_parameters())
        return {name: place[part[0]] if part[0] in place else int(part[1]) + 1 for name, part in parts}


def tiny_sequence_encoder(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> SequenceViT:
    """An encoder that can run on a part of its tokens; at 96 px it has 6 x 6."""
    torch.manual_seed(0)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    return SequenceViT(sides, in_channels)


def tiny_simmim(encoder: nn.Module | None = None, **options: object) -> SimMIM:
    """A SimMIM, on tiny_swin unless another encoder is given; options are fields of SimMIMConfig."""
    return SimMIM(encoder or tiny_swin(), SimMIMConfig(**options))  # type: ignore[arg-type]


def tiny_mae(encoder: nn.Module | None = None, **options: object) -> MAE:
    """An MAE, on tiny_sequence_encoder unless another encoder is given; options are fields of MAEConfig."""
    config = MAEConfig(decoder=DecoderConfig(dim=32, depth=1, num_heads=4), **options)  # type: ignore[arg-type]
    return MAE(encoder or tiny_sequence_encoder(), config)  # type: ignore[arg-type]


def noise_images(batch: int, size: tuple[int, int] = (96, 96), channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=seeded(seed))


def group_maps(num_maps: int = 1, grid: tuple[int, int] = (3, 3), num_images: int = 4, seed: int = 0) -> Tensor:
    return draw_group_map(grid, num_images, seeded(seed), num_maps)
