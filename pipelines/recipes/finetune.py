"""The paper's finetuning of its Swins on ImageNet-1K (table 12) and other sets (table 5), and one for everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.encoders.build import config_at_size
from mixmae.encoders.swin import SwinConfig, swin_base, swin_huge, swin_large
from mixmae.jobs.config import FinetuneConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig
from pipelines.recipes.demo import demo


def demo_finetune() -> FinetuneConfig:
    """Classify images with the demo's very small Swin: minutes on two CPU cores.

    Neither mixed nor strongly distorted images: they pay in hundreds of epochs, not in eight.

    Command:  make finetune, or python pipelines/finetune.py demo_finetune --pretrained runs/demo
    """
    pretraining = demo()
    size = pretraining.augment.image_size
    return FinetuneConfig(
        encoder=pretraining.encoder,
        augment=FinetuneAugmentConfig(image_size=size, crop_scale=(0.5, 1.0), num_operations=0, erasing=0.0),
        mixup=MixupConfig(mixup=0.0, cutmix=0.0),
        optim=OptimConfig(base_lr=0.024, layer_decay=0.8, betas=(0.9, 0.999)),
        loop=LoopConfig(epochs=8, warmup_epochs=1, batch_size=16, log_every_steps=100),
    )


def mixmae_swin_base_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B/W14, 100 epochs of ImageNet-1K.

    Command:  python pipelines/finetune.py mixmae_swin_base_finetune_100ep --pretrained RUN --data IMAGENET_SHARDS
        --output DIR --workers 8
    Hardware: 8 GPUs of 80 GB; hours here: not yet run.
    Expected: 85.1 % top-1 after 600 epochs of pretraining, 84.8 % after 300 (paper, table 2). Ours: not yet run.
    Source:   paper, table 12; random erasing and the base rate of 5e-4 from the official script, which has a drop path
        of 0.1 where the paper has 0.15.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of ImageNet-1K.

    Command, hardware and source: as mixmae_swin_base_finetune_100ep; micro-batches of 64 images a GPU.
    Expected: 85.9 % top-1 after 600 epochs of pretraining (paper, table 3). Ours: not yet run.
    """
    return _paper(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def mixmae_swin_huge_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-H/W14, 50 epochs of ImageNet-1K.

    Command, hardware and source: as mixmae_swin_base_finetune_100ep; micro-batches of 32 images a GPU.
    Expected: 86.9 % top-1 after 600 epochs of pretraining (paper, section 5.1). Ours: not yet run.
    """
    return _paper(swin_huge(), epochs=50, drop_path=0.3, micro_batch_size=32)


def mixmae_swin_base_384px_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B at 384 px (windows 16, 16, 24 and 12), 100 epochs of ImageNet-1K.

    As mixmae_swin_base_finetune_100ep, with 3.2 times its computation (52.6 GMACs); position tables of a pretraining at
    224 px are interpolated. Validation images are cropped without a margin. Micro-batches of 32 images a GPU.
    Expected: the paper gives neither a figure nor settings for this size. Ours: not yet run.
    Source:   windows and the crop without a margin: the official code.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15, image_size=384, micro_batch_size=32, crop_pct=1.0)


def mixmae_swin_base_inat2018_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B/W14, 100 epochs of iNaturalist 2018.

    Command:  python pipelines/finetune.py mixmae_swin_base_inat2018_finetune_100ep --pretrained RUN
        --data SHARDS --output DIR --workers 8, with the set or shards of it (docs/data.md, downstream data sets)
    Hardware: 8 GPUs of 80 GB; hours here: not yet run.
    Data:     8,142 classes, 437,513 training and 24,426 validation images.
    Expected: 78.2 % top-1 (paper, table 5, which does not tell the length of pretraining). Ours: not yet run.
    Source:   paper, appendix A.1: table 12 again, with the drop path adjusted for each set. It does not say to what:
        here it is ImageNet's, and the search space finetune_inat2018 tries others.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_inat2018_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of iNaturalist 2018.

    As mixmae_swin_base_inat2018_finetune_100ep; micro-batches of 64 images a GPU.
    Expected: 80.6 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def mixmae_swin_base_inat2019_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B/W14, 100 epochs of iNaturalist 2019.

    Command, hardware and source: as mixmae_swin_base_inat2018_finetune_100ep, with the search space finetune_inat2019.
    Data:     1,010 classes, 265,213 training and 3,030 validation images.
    Expected: 83.3 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_inat2019_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of iNaturalist 2019.

    As mixmae_swin_base_inat2019_finetune_100ep; micro-batches of 64 images a GPU.
    Expected: 84.4 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def mixmae_swin_base_places205_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B/W14, 100 epochs of Places205.

    Command, hardware and source: as mixmae_swin_base_inat2018_finetune_100ep, with the search space finetune_places205.
    Data:     205 classes, 2,448,873 training and 20,500 validation images.
    Expected: 68.6 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_places205_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of Places205.

    As mixmae_swin_base_places205_finetune_100ep; micro-batches of 64 images a GPU.
    Expected: 69.3 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def mixmae_swin_base_places365_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B/W14, 100 epochs of Places365-Standard.

    Command, hardware and source: as mixmae_swin_base_inat2018_finetune_100ep, with the search space finetune_places365.
    Data:     365 classes, 1,803,460 training and 36,500 validation images.
    Expected: 59.0 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_places365_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of Places365-Standard.

    As mixmae_swin_base_places365_finetune_100ep; micro-batches of 64 images a GPU.
    Expected: 59.6 % top-1 (paper, table 5). Ours: not yet run.
    """
    return _paper(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def _paper(
    encoder: SwinConfig,
    *,
    epochs: int,
    drop_path: float,
    image_size: int = 224,
    micro_batch_size: int | None = None,
    crop_pct: float = 0.875,
) -> FinetuneConfig:
    """Table 12: the defaults of the parts, batch 1024, bfloat16."""
    return FinetuneConfig(
        encoder=config_at_size(replace(encoder, drop_path=drop_path), image_size),
        augment=FinetuneAugmentConfig(image_size=image_size),
        loop=LoopConfig(epochs=epochs, warmup_epochs=5, precision="bfloat16", micro_batch_size=micro_batch_size),
        crop_pct=crop_pct,
    )


FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        demo_finetune,
        mixmae_swin_base_finetune_100ep,
        mixmae_swin_large_finetune_50ep,
        mixmae_swin_huge_finetune_50ep,
        mixmae_swin_base_384px_finetune_100ep,
        mixmae_swin_base_inat2018_finetune_100ep,
        mixmae_swin_large_inat2018_finetune_50ep,
        mixmae_swin_base_inat2019_finetune_100ep,
        mixmae_swin_large_inat2019_finetune_50ep,
        mixmae_swin_base_places205_finetune_100ep,
        mixmae_swin_large_places205_finetune_50ep,
        mixmae_swin_base_places365_finetune_100ep,
        mixmae_swin_large_places365_finetune_50ep,
    )
}
