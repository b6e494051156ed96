"""The paper's finetuning of its Swins on ImageNet-1K (table 12) and on other sets (table 5), and one for everybody."""

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
from pipelines.recipes.small import SMALL_RECIPES
from tune_spaces.transfer import TRANSFERS, Transfer

Recipe = Callable[[], FinetuneConfig]


def demo_finetune() -> FinetuneConfig:
    """Classify images with the demo's very small Swin: minutes on two CPU cores.

    Images are neither mixed nor strongly distorted: that pays off over hundreds of epochs, not over eight.

    Command:  make finetune, or python pipelines/finetune.py demo_finetune --pretrained runs/demo
    """
    pretraining = demo()
    size = pretraining.augment.image_size
    return FinetuneConfig(
        encoder=pretraining.encoder,
        augment=FinetuneAugmentConfig(image_size=size, crop_scale=(0.5, 1.0), num_operations=0, erasing=0.0),
        mixup=MixupConfig(mixup=0.0, cutmix=0.0),
        optim=OptimConfig(base_lr=0.008, layer_decay=0.8, betas=(0.9, 0.999)),  # the peak is 1e-3
        loop=LoopConfig(epochs=8, warmup_epochs=1, batch_size=32, log_every_steps=100),
    )


def paper_finetune(
    encoder: SwinConfig,
    *,
    epochs: int,
    drop_path: float,
    image_size: int = 224,
    micro_batch_size: int | None = None,
    crop_pct: float = 0.875,
) -> FinetuneConfig:
    """All settings of the paper's finetuning.

    Args: micro_batch_size: images per GPU at once, as memory allows; None: the GPU's whole share of the batch.
        crop_pct: side of the validation images' central crop over that of the whole.
    Source: paper, table 12; random erasing and the base rate of 5e-4 from the official script.
    """
    return FinetuneConfig(
        encoder=config_at_size(replace(encoder, drop_path=drop_path), image_size),
        augment=FinetuneAugmentConfig(
            image_size=image_size,
            crop_scale=(0.08, 1.0),
            flip=0.5,
            num_operations=2,  # RandAugment's rand-m9-mstd0.5
            magnitude=9.0,
            magnitude_std=0.5,
            erasing=0.25,
        ),
        mixup=MixupConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
        optim=OptimConfig(
            optimizer="adamw",
            base_lr=5e-4,  # per 256 images: the peak is 2e-3
            weight_decay=0.05,
            betas=(0.9, 0.999),
            layer_decay=0.7,
        ),
        loop=LoopConfig(
            epochs=epochs,
            warmup_epochs=5,
            batch_size=1024,
            micro_batch_size=micro_batch_size,
            precision="bfloat16",
        ),
        crop_pct=crop_pct,
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
    return paper_finetune(swin_base(), epochs=100, drop_path=0.15)


def mixmae_swin_large_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-L/W14, 50 epochs of ImageNet-1K.

    Command, hardware and source: as mixmae_swin_base_finetune_100ep; micro-batches of 64 images per GPU.
    Expected: 85.9 % top-1 after 600 epochs of pretraining (paper, table 3). Ours: not yet run.
    """
    return paper_finetune(swin_large(), epochs=50, drop_path=0.2, micro_batch_size=64)


def mixmae_swin_huge_finetune_50ep() -> FinetuneConfig:
    """Classification with Swin-H/W14, 50 epochs of ImageNet-1K.

    Command, hardware and source: as mixmae_swin_base_finetune_100ep; micro-batches of 32 images per GPU.
    Expected: 86.9 % top-1 after 600 epochs of pretraining (paper, section 5.1). Ours: not yet run.
    """
    return paper_finetune(swin_huge(), epochs=50, drop_path=0.3, micro_batch_size=32)


def mixmae_swin_base_384px_finetune_100ep() -> FinetuneConfig:
    """Classification with Swin-B at 384 px, 100 epochs of ImageNet-1K.

    As mixmae_swin_base_finetune_100ep, with windows of 16, 16, 24 and 12 and 3.2 times its computation (52.6 GMACs).
    Position tables of a pretraining at 224 px are interpolated. Validation images are cropped without a margin.
    Micro-batches of 32 images per GPU.
    Expected: the paper gives neither a figure nor settings for this size. Ours: not yet run.
    Source:   windows and the crop without a margin: the official code.
    """
    return paper_finetune(swin_base(), epochs=100, drop_path=0.15, image_size=384, micro_batch_size=32, crop_pct=1.0)


def _transfer(transfer: Transfer, *, large: bool) -> Recipe:
    """Make the recipe that finetunes Swin-B, or Swin-L, on a set of table 5, with the settings of ImageNet-1K."""
    imagenet = mixmae_swin_large_finetune_50ep if large else mixmae_swin_base_finetune_100ep
    encoder, epochs, top1 = ("Swin-L", 50, transfer.large_top1) if large else ("Swin-B", 100, transfer.base_top1)
    micro_batches = "; micro-batches of 64 images per GPU" if large else ""
    images = f"{transfer.num_classes:,} classes, {transfer.train_images:,} training and {transfer.val_images:,}"
    space = "" if large else f" The search space finetune_{transfer.name} tries others."

    def recipe() -> FinetuneConfig:
        return imagenet()

    recipe.__name__ = recipe.__qualname__ = imagenet.__name__.replace("_finetune_", f"_{transfer.name}_finetune_")
    recipe.__doc__ = f"""Classification with {encoder}/W14, {epochs} epochs of {transfer.title}.

    Command:  python pipelines/finetune.py {recipe.__name__} --pretrained RUN
        --data SHARDS --output DIR --workers 8, with the set or shards of it (docs/data.md, downstream data sets)
    Hardware: 8 GPUs of 80 GB{micro_batches}; hours here: not yet run.
    Data:     {images} validation images
        ({transfer.source}).
    Expected: {top1} % top-1 (paper, table 5, which does not say how long it pretrained). Ours: not yet run.
    Source:   paper, appendix A.1: table 12 again, with the drop path adjusted for each set, to values that it does not
        print. Here it is ImageNet's.{space}
    """
    return recipe


TRANSFER_RECIPES = tuple(_transfer(transfer, large=large) for transfer in TRANSFERS for large in (False, True))
"""Recipes, each named mixmae_swin_{size}_{set}_finetune_{epochs}ep."""

FINETUNE_RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        demo_finetune,
        *SMALL_RECIPES.values(),
        mixmae_swin_base_finetune_100ep,
        mixmae_swin_large_finetune_50ep,
        mixmae_swin_huge_finetune_50ep,
        mixmae_swin_base_384px_finetune_100ep,
        *TRANSFER_RECIPES,
    )
}
