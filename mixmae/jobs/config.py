"""The config of a whole run, of pretraining or of finetuning: the parts' dataclasses side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.data.streams import StreamConfig
from mixmae.encoders.build import EncoderConfig, config_to_json
from mixmae.methods.build import MethodConfig, images_mixed
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.probing.ridge import OnlineProbeConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all training runs have in common."""

    encoder: EncoderConfig
    """The architecture, built for augment.image_size whatever its own image_size says."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What is done to the training images."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How Ray Data executes the data order."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, batch, precision and bookkeeping."""
    window_rows: int | None = None
    """Images a shuffle window holds: what the data order mixes beyond whole row groups. None: 16384 where single images
    can be read (prepared shards, tars, files), else 1024, because each block reads all row groups of its window."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean that pixels (0..1) are normalised with, a value a channel."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Spread that pixels (0..1) are normalised with, a value a channel."""

    def __post_init__(self) -> None:
        if any(side % 32 or side < 64 for side in self.augment.size):
            raise ValueError(
                f"The image size is {self.augment.image_size}: each side must be a multiple of 32 px (the mask unit) "
                "and at least 64 px, change --augment.image-size."
            )
        channels = self.encoder.in_channels
        if not len(self.pixel_mean) == len(self.pixel_std) == channels:
            raise ValueError(f"pixel_mean and pixel_std need a value for each of the encoder's {channels} channels.")

    def sized_encoder(self) -> EncoderConfig:
        """The encoder's config for the size of the training images."""
        return replace(self.encoder, image_size=self.augment.image_size)

    def window_rows_for(self, exact_reads: bool) -> int:
        """The window for a source that can, or cannot, read single images (docs/benchmarks/order_202611.md)."""
        return self.window_rows or (16384 if exact_reads else 1024)

    def micro_batch(self, num_workers: int) -> int:
        """Images a worker puts through the model at once.   Raises: ValueError if the batch cannot be cut so."""
        return self.loop.batch_size // num_workers // self.loop.accumulation(num_workers)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> normalised float32, on the images' device."""
        mean = torch.tensor(self.pixel_mean, device=images.device)[:, None, None]
        std = torch.tensor(self.pixel_std, device=images.device)[:, None, None]
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """All that decides what a pretraining run computes."""

    method: MethodConfig = field(default_factory=MixMAEConfig)
    """The pretext task: MixMAE, SimMIM or MAE."""
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    """Classifying labelled images by the encoder's features along the way."""

    def __post_init__(self) -> None:
        mixed = images_mixed(self.method)
        if self.loop.batch_size % mixed:
            raise ValueError(
                f"A batch of {self.loop.batch_size} images cannot be mixed {mixed} at a time: make "
                f"--loop.batch-size a multiple of --method.num-images ({mixed})."
            )
        super().__post_init__()

    def micro_batch(self, num_workers: int) -> int:
        """Images a worker puts through the model at once.   Raises: ValueError if the batch cannot be cut so."""
        micro = super().micro_batch(num_workers)
        mixed = images_mixed(self.method)
        if micro % mixed:
            raise ValueError(
                f"With {num_workers} workers the model sees {micro} images at once, which cannot be mixed "
                f"{mixed} at a time: change --loop.batch-size, --loop.micro-batch-size or --workers."
            )
        return micro


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """All that decides what a finetuning run computes; the defaults are the paper's (table 12)."""

    augment: FinetuneAugmentConfig = field(default_factory=FinetuneAugmentConfig)
    """Crop, flip, RandAugment and random erasing of the training images."""
    mixup: MixupConfig = field(default_factory=MixupConfig)
    """Mixup, CutMix and label smoothing; images are mixed inside a micro-batch."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(base_lr=5e-4, layer_decay=0.7, betas=(0.9, 0.999)))
    """Optimiser; layer_decay lowers the rate from the head down to the stem."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100, warmup_epochs=5))
    """Length, batch, precision and bookkeeping; panel_every_epochs says how often the validation set is looked at."""
    resize_share: float = 0.875
    """Side of the validation images' central crop over that of the whole: 224 / 256; 1 for no margin."""
    ema_decay: float | None = None
    """Decay of a running average of the weights that is evaluated beside them (0.9999 is usual); None: no average."""
    divergence: float | None = 3.0
    """Stop when the mean loss is above this many times that of a guess, the logarithm of the number of classes; None:
    only when it is not a number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.resize_share <= 1:
            raise ValueError(f"resize_share is {self.resize_share}: it must be in (0, 1], 0.875 is usual.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: it must be in [0, 1), or None for no average.")
        if self.divergence is not None and not self.divergence > 1:
            raise ValueError(f"divergence is {self.divergence}: it must be above 1, or None.")


#: Fields that may differ when a run is continued, beside those of stream and probe: they change speed and bookkeeping,
#: not what is computed.
RESUMABLE = frozenset(
    {
        "loop.compile",
        "loop.log_every_steps",
        "loop.panel_every_epochs",
        "loop.checkpoint_every_epochs",
        "loop.max_broken_fraction",
        "loop.micro_batch_size",
    }
)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configs (as from `to_json`) differ in a way that a continued run cannot."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new and name not in RESUMABLE and not name.startswith(("stream.", "probe")):
            found.append(f"{name} was {old} and is {new}")
    return found


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values (tuples become lists); the encoder's and the method's say their type."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    content = plain(asdict(config))
    if isinstance(config, PretrainConfig):
        content["method"] = {"type": type(config.method).__name__, **content["method"]}
    return content | {"encoder": config_to_json(config.encoder)}
