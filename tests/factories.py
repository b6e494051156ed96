"""Tiny things for tests: models that run in milliseconds, images of noise, group maps, checkpoints, files."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor, nn

from mixmae.data.source import Sample, Source, read_rows
from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import config_to_json
from mixmae.encoders.pvt import PvtConfig, PvtEncoder
from mixmae.encoders.resnetv2 import ResNetV2Config, ResNetV2Encoder
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.encoders.twins import TwinsConfig, TwinsEncoder
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.mixing import draw_group_map
from mixmae.training.checkpoint import save_checkpoint

ModelT = TypeVar("ModelT", bound=nn.Module)


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


TINY_PYRAMID = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (2, 1, 2, 2),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
}
"""0.1 M parameters; all stages but the second have both kinds of SVT's attention."""

DECODER = DecoderConfig(dim=32, depth=1, num_heads=4)


def tiny_pvt(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> PvtEncoder:
    torch.manual_seed(0)
    return PvtEncoder(PvtConfig(image_size=image_size, in_channels=in_channels, **TINY_PYRAMID))


def tiny_pvt_v2(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> PvtEncoder:
    torch.manual_seed(0)
    return PvtEncoder(PvtConfig(version=2, image_size=image_size, in_channels=in_channels, **TINY_PYRAMID))


def tiny_pcpvt(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> TwinsEncoder:
    torch.manual_seed(0)
    return TwinsEncoder(TwinsConfig(image_size=image_size, in_channels=in_channels, **TINY_PYRAMID))


def tiny_svt(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> TwinsEncoder:
    """At 96 px the windows of stages 1 to 3 are padded and cross mask cells."""
    torch.manual_seed(0)
    sizes = {**TINY_PYRAMID, "window_sizes": (7, 7, 5, 3)}
    return TwinsEncoder(TwinsConfig(image_size=image_size, in_channels=in_channels, **sizes))


def tiny_shifted_swin(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> SwinEncoder:
    """tiny_swin with shifts in stages 1 to 3 at 96 px; stages 1 and 3 (windows of 7 and 4) are padded, too."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=image_size,
        in_channels=in_channels,
        embed_dim=16,
        depths=(2, 2, 3, 2),
        num_heads=(1, 2, 4, 8),
        window_sizes=(7, 6, 4, 3),
        shift=True,
    )
    return SwinEncoder(config)


def tiny_vit(image_size: int | tuple[int, int] = 96, in_channels: int = 3, class_token: bool = False) -> ViTEncoder:
    """A ViT of 0.1 M parameters; at 96 px it has 6 x 6 tokens."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=image_size, in_channels=in_channels, embed_dim=32, depth=3, num_heads=4, class_token=class_token
    )
    return ViTEncoder(config)


def tiny_resnetv2(image_size: int | tuple[int, int] = 96, in_channels: int = 3) -> ResNetV2Encoder:
    """A ResNet v2 of 0.2 M parameters with norms of 4 groups."""
    torch.manual_seed(0)
    config = ResNetV2Config(
        image_size=image_size, in_channels=in_channels, stem_dim=8, depths=(2, 1, 1, 1), num_norm_groups=4
    )
    return ResNetV2Encoder(config)


def small_swin(image_size: int | tuple[int, int] = 32, in_channels: int = 3) -> SwinEncoder:
    """For small images: patches of 2 px, two stages, cells of 4 px; windows are padded in stage 1."""
    torch.manual_seed(0)
    return SwinEncoder(
        SwinConfig(
            image_size=image_size,
            in_channels=in_channels,
            patch_px=2,
            embed_dim=16,
            depths=(1, 2),
            num_heads=(1, 2),
            window_sizes=(6, 4),
        )
    )


def swin_of_pixels(image_size: int | tuple[int, int] = 28, in_channels: int = 3) -> SwinEncoder:
    """Patches of 1 px, three stages, cells of 4 px; windows are padded in stages 1 and 2."""
    torch.manual_seed(0)
    return SwinEncoder(
        SwinConfig(
            image_size=image_size,
            in_channels=in_channels,
            patch_px=1,
            embed_dim=8,
            depths=(1, 1, 1),
            num_heads=(1, 2, 2),
            window_sizes=(6, 5, 7),
        )
    )


SMALL_PYRAMID = {
    "patch_px": 2,
    "embed_dims": (8, 16, 24),
    "depths": (2, 1, 2),
    "num_heads": (1, 2, 3),
    "mlp_ratios": (2.0, 2.0, 2.0),
    "sr_ratios": (4, 2, 1),
}
"""Patches of 2 px, three stages, cells of 8 px."""


def small_pvt(image_size: int | tuple[int, int] = 32, in_channels: int = 3) -> PvtEncoder:
    torch.manual_seed(0)
    return PvtEncoder(PvtConfig(image_size=image_size, in_channels=in_channels, **SMALL_PYRAMID))


def small_pvt_v2(image_size: int | tuple[int, int] = 32, in_channels: int = 3) -> PvtEncoder:
    torch.manual_seed(0)
    return PvtEncoder(PvtConfig(version=2, image_size=image_size, in_channels=in_channels, **SMALL_PYRAMID))


def small_svt(image_size: int | tuple[int, int] = 32, in_channels: int = 3) -> TwinsEncoder:
    torch.manual_seed(0)
    sizes = {**SMALL_PYRAMID, "window_sizes": (5, 5, 3)}
    return TwinsEncoder(TwinsConfig(image_size=image_size, in_channels=in_channels, **sizes))


def small_vit(image_size: int | tuple[int, int] = 32, in_channels: int = 3) -> ViTEncoder:
    """Patches of 4 px, cells of 8 px."""
    torch.manual_seed(0)
    return ViTEncoder(
        ViTConfig(image_size=image_size, in_channels=in_channels, patch_px=4, embed_dim=32, depth=2, num_heads=4)
    )


def tiny_mixmae(
    image_size: int | tuple[int, int] = 96,
    in_channels: int = 3,
    **options: object,
) -> MixMAE:
    """A MixMAE on tiny_swin; options are fields of MixMAEConfig."""
    config = MixMAEConfig(decoder=DECODER, **options)  # type: ignore[arg-type]
    return MixMAE(tiny_swin(image_size, in_channels), config)


def ablation_mixmae(fill: str) -> MixMAE:
    """tiny_mixmae that fills the hidden half of one image (paper section 6)."""
    return tiny_mixmae(num_images=2, fill=fill, unmixing="none")


def tiny_simmim(encoder: nn.Module | None = None, **options: object) -> SimMIM:
    """A SimMIM, on tiny_swin unless another encoder is given; options are fields of SimMIMConfig."""
    return SimMIM(encoder or tiny_swin(), SimMIMConfig(**options))  # type: ignore[arg-type]


def tiny_mae(encoder: nn.Module | None = None, **options: object) -> MAE:
    """An MAE, on tiny_vit unless another encoder is given; options are fields of MAEConfig."""
    config = MAEConfig(decoder=DECODER, **options)  # type: ignore[arg-type]
    return MAE(encoder or tiny_vit(), config)  # type: ignore[arg-type]


def noise_images(batch: int, size: tuple[int, int] = (96, 96), channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=seeded(seed))


def group_maps(num_maps: int = 1, grid: tuple[int, int] = (3, 3), num_images: int = 4, seed: int = 0) -> Tensor:
    return draw_group_map(grid, num_images, seeded(seed), num_maps)


def jpeg(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A smooth colour image; each seed has its own pixels."""
    low = np.random.default_rng(seed).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of (name, bytes) members; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as stream:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            stream.addfile(entry, io.BytesIO(data))
    return path


def all_samples(source: Source) -> list[Sample]:
    return read_rows(source, range(source.num_rows))


def clouds(num_images: int, width: int, std: float) -> tuple[Tensor, Tensor]:
    """Features (num_images, width) of three classes as clouds of this std, and their labels."""
    labels = torch.arange(num_images) % 3
    noise = torch.randn(num_images, width, generator=seeded(1))
    return torch.randn(3, width, generator=seeded())[labels] + std * noise, labels


def trained(model: ModelT, seed: int = 5) -> ModelT:
    """The model in evaluation mode, with weights that no initialisation gives."""
    generator = seeded(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def checkpoint_of(model: nn.Module, base: Path) -> Path:
    """A checkpoint after step 1 of a run in base/runs/photos, which MLflow does not know."""
    checkpoint = base / "runs" / "photos" / "checkpoints" / "step_0000001"
    config = {"encoder": config_to_json(model.encoder.config), "augment": {"image_size": model.encoder.image_size[0]}}  # type: ignore[union-attr, arg-type]
    save_checkpoint(checkpoint, model=model, optimizer=None, state={"config": config, "position": {"step": 1}})
    (checkpoint.parents[1] / "run.json").write_text("{}", encoding="utf-8")
    return checkpoint
