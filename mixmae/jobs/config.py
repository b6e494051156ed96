"""The config of a whole run, of pretraining or of finetuning: the parts' dataclasses side by side.

Legend: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from mixmae.data.images.augment import AugmentConfig, BaseAugmentConfig
from mixmae.data.images.decode import MODES
from mixmae.data.images.detect_augment import DetectAugmentConfig
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.data.images.segment_augment import SegmentAugmentConfig
from mixmae.data.stream_config import StreamConfig
from mixmae.detection.config import DetectorConfig
from mixmae.encoders.build import EncoderConfig, config_at_size, config_from_json, config_to_json
from mixmae.encoders.swin import SwinConfig
from mixmae.methods.build import MethodConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise, usual_normalisation
from mixmae.probing.online import OnlineProbeConfig
from mixmae.segmentation.upernet import UPerNetConfig
from mixmae.share import WorkerShare
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength, run_length


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all training runs have in common."""

    encoder: EncoderConfig
    """The architecture. It is built for augment.image_size, so image_size need not be given here."""
    augment: BaseAugmentConfig = field(default_factory=AugmentConfig)
    """What is done to the training images."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How Ray Data executes the data order."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, batch, precision and bookkeeping."""
    window_rows: int | None = None
    """Images per shuffle window, within which the data order mixes single images. None: 16384 where single images can
    be read (prepared shards, tars, files), else 1024, because each block reads all row groups of its window."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean that pixels (0..1) are normalised with, one value per channel; where it is not given, ImageNet's for the
    encoder's channels."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Std that pixels (0..1) are normalised with, likewise."""

    def __post_init__(self) -> None:
        stages = len(self.encoder.strides)
        for number in self.loop.recompute_stages:
            if not 1 <= number <= stages:
                raise ValueError(
                    f"recompute_stages has {number}: the encoder's stages are 1 to {stages}, change "
                    "--loop.recompute-stages."
                )
        channels = self.encoder.in_channels
        if channels not in MODES:
            raise ValueError(
                f"in_channels is {channels}: image files are read as 1 channel (grey), 3 (RGB) or 4 (RGBA), change "
                "--encoder.in-channels."
            )
        for index, name in enumerate(("pixel_mean", "pixel_std")):
            if getattr(self, name) in [usual_normalisation(number)[index] for number in MODES]:
                # The usual values, perhaps for another number of channels: a recipe's whose encoder was changed.
                object.__setattr__(self, name, usual_normalisation(channels)[index])
        if not len(self.pixel_mean) == len(self.pixel_std) == channels:
            raise ValueError(f"pixel_mean and pixel_std need a value for each of the encoder's {channels} channels.")

    def check_size(self) -> None:
        """Raise ValueError unless the images are whole tokens of the encoder's last stage.

        Not checked before: the encoder of a finetuning run may yet change to that of the pretrained weights.
        """
        self._check_sides(self.encoder.strides[-1], "the pixels under a token of the encoder's last stage")

    def _check_sides(self, unit_px: int, unit: str, or_change: str = "") -> None:
        """Raise ValueError unless the sides of the images are multiples of unit_px, with the nearest sizes that are."""
        if all(side and side % unit_px == 0 for side in self.augment.size):
            return
        lower = [max(1, side // unit_px) * unit_px for side in self.augment.size]
        upper = [-(-side // unit_px) * unit_px for side in self.augment.size]
        near = dict.fromkeys(" ".join(map(str, size[: 1 + (size[0] != size[1])])) for size in (lower, upper))
        raise ValueError(
            f"The image size is {self.augment.image_size}, but each side must be a multiple of {unit_px} px, {unit}: "
            f"use --augment.image-size {' or '.join(near)}{or_change}."
        )

    def sized_encoder(self) -> EncoderConfig:
        """The encoder's config for the size of the training images: the one to build it from."""
        return replace(self.encoder, image_size=self.augment.image_size)

    def window_rows_for(self, exact_reads: bool) -> int:
        """The shuffle window for a source that can, or cannot, read single images (docs/benchmarks/order_202611.md)."""
        return self.window_rows or (16384 if exact_reads else 1024)

    def share(self, *, num_workers: int, rank: int = 0) -> WorkerShare:
        """One worker's part of every batch.   Raises: ValueError if the batch cannot be cut so."""
        return WorkerShare(
            batch_size=self.loop.batch_size,
            block=self.block,
            micro_batch_size=self.loop.micro_batch_size,
            rank=rank,
            num_workers=num_workers,
        )

    @property
    def draws_per_micro_batch(self) -> bool:
        """Whether a micro-batch is more than its images: paths are dropped, images mixed (mixup) or normalised (batch
        norm) by draws and statistics of the whole of it."""
        return True

    @property
    def block(self) -> int:
        """Images of a batch that stay together, so that what is drawn does not depend on the number of workers: where
        micro-batches draw, and have a size, whole ones are dealt to the workers."""
        return self.loop.micro_batch_size or 1

    def length(self, num_images: int) -> RunLength:
        """The run's length in steps on so many training images.   Raises: ValueError if they are less than a batch."""
        loop = self.loop
        return run_length(
            num_images=num_images,
            batch_size=loop.batch_size,
            epochs=loop.epochs,
            warmup_epochs=loop.warmup_epochs,
            steps=loop.steps,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> normalised float32, on the images' device."""
        return normalise(images, mean=self.pixel_mean, std=self.pixel_std)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """All that decides what a pretraining run computes."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Crop and flip of the training images."""
    method: MethodConfig = field(default_factory=MixMAEConfig)
    """The pretext task: MixMAE, SimMIM or MAE."""
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    """The evaluations during pretraining, of the encoder's features on labelled images."""

    def __post_init__(self) -> None:
        mixed = self.method.images_mixed
        if self.loop.batch_size % mixed:
            raise ValueError(
                f"A batch of {self.loop.batch_size} images cannot be mixed {mixed} at a time: make "
                f"--loop.batch-size a multiple of --method.num-images ({mixed})."
            )
        super().__post_init__()
        self.check_size()

    def check_size(self) -> None:
        """Raise ValueError unless the images are whole mask cells, as many as the method needs."""
        stride, cell_px = self.encoder.strides[-1], self.method.cell_px_on(self.encoder)
        if cell_px < 1 or cell_px % stride:
            raise ValueError(
                f"--method.cell-px is {cell_px}, which would cut tokens of the encoder's last stage: make it a "
                f"multiple of {stride}, or choose a smaller --encoder.patch-px."
            )
        whole_tokens = all(side % stride == 0 for side in self.augment.size)
        other_cells = f", or --method.cell-px {stride}" if whole_tokens else ", or a smaller --encoder.patch-px"
        self._check_sides(cell_px, "the side of a mask cell", other_cells)
        height, width = self.augment.size
        num_cells = height * width // cell_px**2
        needed = math.ceil(round(1 / (1 - self.method.mask_ratio), 6))
        if num_cells < needed:
            fewer = "--method.num-images" if isinstance(self.method, MixMAEConfig) else "--method.mask-ratio"
            smaller = f", a smaller --method.cell-px (a multiple of {stride})" if cell_px > stride else ""
            raise ValueError(
                f"Images of {height} x {width} px have {num_cells} mask cell{'s' * (num_cells != 1)} of {cell_px} px, "
                "and the method needs "
                f"{needed}: choose a larger --augment.image-size{smaller} or a smaller {fewer}."
            )

    @property
    def draws_per_micro_batch(self) -> bool:
        """Whether paths are dropped."""
        return self.encoder.drop_path > 0

    @property
    def block(self) -> int:
        """Images that mix with each other; whole micro-batches where these draw (RunConfig.block)."""
        mixed, micro_batch = self.method.images_mixed, self.loop.micro_batch_size
        return micro_batch if self.draws_per_micro_batch and micro_batch and micro_batch % mixed == 0 else mixed


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """What runs have in common that learn classes."""

    ema_decay: float | None = None
    """Decay of a running average of the weights that is evaluated beside them (0.9999 is usual); None: no average."""
    divergence: float | None = 3.0
    """Stop when the mean loss is above this many times the loss of a uniform prediction, which is log(num_classes) for
    one classifier; None: stop only on NaN or infinity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: it must be in [0, 1), or None for no average.")
        if self.divergence is not None and not self.divergence > 1:
            raise ValueError(f"divergence is {self.divergence}: it must be above 1, or None.")

    def adapted(self, own: EncoderConfig) -> EncoderConfig:
        """The encoder of pretrained weights as this run takes it.   Args: own: with the run's drop path."""
        return config_at_size(own, self.augment.image_size)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """All that decides what a finetuning run computes; the defaults are the paper's (table 12)."""

    augment: FinetuneAugmentConfig = field(default_factory=FinetuneAugmentConfig)
    """Crop, flip, RandAugment and random erasing of the training images."""
    mixup: MixupConfig = field(default_factory=MixupConfig)
    """Mixup, CutMix and label smoothing; images are mixed inside a micro-batch."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(base_lr=5e-4, layer_decay=0.7, betas=(0.9, 0.999)))
    """Optimiser; layer_decay lowers the learning rate from the head down to the stem."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100, warmup_epochs=5))
    """Length, batch, precision and bookkeeping; evaluate_every_epochs is how often the validation set is evaluated."""
    crop_pct: float = 0.875
    """Side of the validation images' central crop over that of the resized image: 224 / 256; 1 for no margin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}: it must be in (0, 1], 0.875 is usual.")


@dataclass(frozen=True, kw_only=True)
class DenseConfig(SupervisedConfig):
    """What runs have in common that learn from what is known about the pixels of an image."""

    def adapted(self, own: EncoderConfig) -> EncoderConfig:
        """As of all runs, but for a Swin of the recipe's widths and depths with the recipe's windows."""
        wanted = self.encoder
        if isinstance(own, SwinConfig) and isinstance(wanted, SwinConfig):
            names = ("window_sizes", "wide_blocks", "wide_window")
            alike = ("embed_dim", "depths", "num_heads", "shift")
            if all(getattr(own, name) == getattr(wanted, name) for name in alike):
                own = replace(own, **{name: getattr(wanted, name) for name in names})
        return replace(own, image_size=self.augment.image_size)


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(DenseConfig):
    """All that decides what a segmentation run computes; the defaults are those of ADE20K."""

    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    """Resize, crop, flip and colours of the training images, together with their masks."""
    head: UPerNetConfig = field(default_factory=UPerNetConfig)
    """What stands on the encoder."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, layer_decay=0.75, layer_decay_rule="timm", betas=(0.9, 0.999))
    )
    """Optimiser; layer_decay lowers the learning rate from the head down to the stem."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(epochs=100, warmup_epochs=1, batch_size=16, schedule="poly")
    )
    """Length, batch, precision and bookkeeping; evaluate_every_epochs is how often the validation set is evaluated."""
    slide_stride: int = 341
    """Pixels between the windows, of augment.image_size, that a larger image is evaluated in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.slide_stride <= min(self.augment.size):
            raise ValueError(
                f"slide_stride is {self.slide_stride}: it must lie between 1 and the side of the windows, which is "
                f"augment.image_size ({min(self.augment.size)})."
            )

    @property
    def draws_per_micro_batch(self) -> bool:
        """Whether paths or channels are dropped, or norms are of the whole micro-batch."""
        return self.encoder.drop_path > 0 or self.head.dropout > 0 or self.head.norm == "batch"

    @property
    def block(self) -> int:
        """Images of a batch that stay together: see RunConfig.block."""
        return super().block if self.draws_per_micro_batch else 1

    def share(self, *, num_workers: int, rank: int = 0) -> WorkerShare:
        """One worker's part of every batch.   Raises: ValueError if the batch cannot be cut so, or is too small."""
        share = super().share(num_workers=num_workers, rank=rank)
        if self.head.norm == "batch" and min(share.micro_batches) < 2:
            raise ValueError(
                "A worker's batch norms need two images at once, at least: change --loop.batch-size, "
                "--loop.micro-batch-size or --workers, or give --head.norm group."
            )
        return share


@dataclass(frozen=True, kw_only=True)
class DetectConfig(DenseConfig):
    """All that decides what a detection run computes; the defaults are those of COCO."""

    augment: DetectAugmentConfig = field(default_factory=DetectAugmentConfig)
    """Scale, crop and flip of the training images, together with their objects."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """What stands on the encoder."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=8e-5, weight_decay=0.1, layer_decay=0.85, layer_decay_rule="timm", betas=(0.9, 0.999)
        )
    )
    """Optimiser; layer_decay lowers the learning rate from the heads down to the stem."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(epochs=55, warmup_epochs=0.25, batch_size=64, schedule="step")
    )
    """Length, batch, precision and bookkeeping; evaluate_every_epochs is how often the validation set is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.detector.strides(self.encoder.strides)


RESUMABLE = frozenset(
    {
        "loop.compile",
        "loop.deterministic",
        "loop.recompute_stages",
        "loop.shard",
        "loop.log_every_steps",
        "loop.evaluate_every_epochs",
        "loop.checkpoint_every_epochs",
        "loop.checkpoint_every_minutes",
        "loop.max_bad_steps",
        "loop.max_broken_fraction",
        "loop.max_loss",
        "loop.micro_batch_size",  # unless something is drawn for each micro-batch: dropped paths, mixup
    }
)
"""Fields that may differ when a run is continued, beside those of stream and probe: they change speed and bookkeeping,
not what is computed."""


BRANCHABLE = frozenset(
    {
        "optim.base_lr",
        "optim.lr",
        "optim.clip_grad_norm",
        "optim.weight_decay",
        "loop.warmup_epochs",
        "loop.epochs",
        "loop.steps",
    }
)
"""Fields that may differ, besides, when a run goes back to an earlier checkpoint (--from-step)."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configs (as from `to_json`) differ and a continued run must not."""
    if not prefix:  # fields that the encoder of an earlier version did not have get their defaults
        before = {**before, "encoder": config_to_json(config_from_json(before["encoder"]))}
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new and name not in RESUMABLE and not name.startswith(("stream.", "probe")):
            found.append(f"{name} was {old} and is {new}")
    if not prefix:
        sizes = [config.get("loop", {}).get("micro_batch_size") for config in (before, now)]
        mixup = now.get("mixup", {})
        mixes = mixup.get("probability") and (mixup.get("mixup") or mixup.get("cutmix"))
        other = "drop other paths" if now["encoder"].get("drop_path") else "mix other images" if mixes else ""
        if sizes[0] != sizes[1] and other:
            found.append(f"loop.micro_batch_size was {sizes[0]} and is {sizes[1]}, which would {other}")
    return found


def completed(before: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The config of an earlier version, with the defaults of fields that it did not have.

    Args: before: as from `to_json`.  config: of the same kind.
    """
    content = dict(before)
    for part in (config.loop, config.optim, config.augment):
        name = next(field.name for field in fields(config) if getattr(config, field.name) is part)
        if name in content:
            content[name] = {**_plain(asdict(type(part)())), **content[name]}
    return content


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values (tuples become lists); the encoder's and the method's have their type."""

    content = _plain(asdict(config))
    if isinstance(config, PretrainConfig):
        content["method"] = {"type": type(config.method).__name__, **content["method"]}
    return content | {"encoder": config_to_json(config.encoder)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
