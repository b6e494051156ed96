"""MixMAE of small images, 28 to 96 px, and the finetuning of each: one GPU, or patience.

None of them has been run yet. What they have in common, and why:
- A cell is one token of the last stage; the stages end where an image has about as many cells as in the paper (7 x 7
  at 224 px): 49, 64, 64 and 36. Patches are 2 px; at 96 px they are 4 px, or the first stage would have 2,304 tokens.
- Four images per mix: 75 % of each is hidden, as in the paper and in public MAE trainings on CIFAR.
- Those trainings also give the length (800 to 2,000 epochs of 50,000 images) and the peak rate (2.4e-3 for batches of
  4,096). Here batches are smaller, and so is the rate: 1.5e-3 for 512 images.
- Crops are larger than the paper's where a fifth of an image would be a few pixels.
- Finetuning: rate 1e-3 and layer decay 0.75, as is usual for MAE on such sets, and no margin around validation images.
Other sets need other lengths: --loop.epochs. Rates and lengths have not been tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig
from mixmae.jobs.config import FinetuneConfig, PretrainConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig

SWIN_28PX = SwinConfig(
    in_channels=1, image_size=28, patch_px=2, embed_dim=64, depths=(2, 4), num_heads=(2, 4), window_sizes=(14, 7)
)
"""0.9 M parameters, strides 2 and 4; attention over the whole image."""
SWIN_32PX = SwinConfig(image_size=32, patch_px=2, embed_dim=96, depths=(2, 10), num_heads=(3, 6), window_sizes=(16, 8))
"""4.8 M parameters, strides 2 and 4; attention over the whole image."""
SWIN_64PX = SwinConfig(
    image_size=64, patch_px=2, embed_dim=96, depths=(2, 6, 2), num_heads=(3, 6, 12), window_sizes=(16, 16, 8)
)
"""6.9 M parameters, strides 2, 4 and 8; four windows in the first stage."""
SWIN_96PX = SwinConfig(
    image_size=96, patch_px=4, embed_dim=96, depths=(2, 6, 2), num_heads=(3, 6, 12), window_sizes=(12, 12, 6)
)
"""6.9 M parameters, strides 4, 8 and 16; four windows in the first stage."""


def _pretrain(encoder: SwinConfig, *, epochs: int, smallest_crop: float, flip: float = 0.5) -> PretrainConfig:
    """What the pretrainings have in common.   Args: smallest_crop: share of the image's area."""
    return PretrainConfig(
        encoder=encoder,
        method=MixMAEConfig(num_images=4, decoder=DecoderConfig(dim=192, depth=2, num_heads=6)),
        augment=AugmentConfig(image_size=encoder.image_size, crop_scale=(smallest_crop, 1.0), flip=flip),
        optim=OptimConfig(base_lr=7.5e-4),  # per 256 images: the peak is 1.5e-3
        loop=LoopConfig(
            epochs=epochs,
            warmup_epochs=epochs / 20,
            batch_size=512,
            evaluate_every_epochs=10,  # an epoch takes seconds
            checkpoint_every_epochs=10,
        ),
    )


def _finetune(encoder: SwinConfig, augment: FinetuneAugmentConfig, mixup: MixupConfig) -> FinetuneConfig:
    """What the finetunings have in common."""
    return FinetuneConfig(
        encoder=replace(encoder, drop_path=0.1),
        augment=replace(augment, image_size=encoder.image_size),
        mixup=mixup,
        optim=OptimConfig(base_lr=1e-3, layer_decay=0.75, betas=(0.9, 0.999)),
        loop=LoopConfig(epochs=100, warmup_epochs=5, batch_size=256),
        crop_pct=1.0,
    )


def mixmae_swin_28px_grey_200ep() -> PretrainConfig:
    """MixMAE of grey images of 28 px (MNIST, medical ones), 200 epochs.

    Images are not mirrored: that makes other letters, and other bodies. For coloured sets of this size (PathMNIST):
    --encoder.in-channels 3.

    Command:  python pipelines/pretrain.py mixmae_swin_28px_grey_200ep --data FOLDER_OF_IMAGES --output DIR
    Hardware: one GPU; hours here: not yet run.
    Expected: not yet run.
    """
    return _pretrain(SWIN_28PX, epochs=200, smallest_crop=0.6, flip=0.0)


def mixmae_swin_28px_grey_finetune_100ep() -> FinetuneConfig:
    """Classification of grey images of 28 px (MNIST, medical ones), 100 epochs.

    Without flips, RandAugment (which inverts brightness, too), erasing and mixing: digits need none of them.

    Command:  python pipelines/finetune.py mixmae_swin_28px_grey_finetune_100ep --pretrained RUN --data LABELLED
    Expected: not yet run.
    """
    augment = FinetuneAugmentConfig(crop_scale=(0.6, 1.0), flip=0.0, num_operations=0, erasing=0.0)
    return _finetune(SWIN_28PX, augment, MixupConfig(mixup=0.0, cutmix=0.0))


def mixmae_swin_32px_800ep() -> PretrainConfig:
    """MixMAE of images of 32 px (CIFAR), 800 epochs.

    Command:  python pipelines/pretrain.py mixmae_swin_32px_800ep --data FOLDER_OF_IMAGES --output DIR
    Hardware: one GPU; hours here: not yet run.
    Expected: not yet run.
    """
    return _pretrain(SWIN_32PX, epochs=800, smallest_crop=0.5)


def mixmae_swin_32px_finetune_100ep() -> FinetuneConfig:
    """Classification of images of 32 px (CIFAR), 100 epochs.

    Command:  python pipelines/finetune.py mixmae_swin_32px_finetune_100ep --pretrained RUN --data LABELLED
    Expected: not yet run.
    """
    return _finetune(SWIN_32PX, FinetuneAugmentConfig(crop_scale=(0.5, 1.0)), MixupConfig())


def mixmae_swin_64px_400ep() -> PretrainConfig:
    """MixMAE of images of 64 px (EuroSAT, Tiny-ImageNet), 400 epochs.

    Command:  python pipelines/pretrain.py mixmae_swin_64px_400ep --data FOLDER_OF_IMAGES --output DIR
    Hardware: one GPU; hours here: not yet run.
    Expected: not yet run.
    """
    return _pretrain(SWIN_64PX, epochs=400, smallest_crop=0.3)


def mixmae_swin_64px_finetune_100ep() -> FinetuneConfig:
    """Classification of images of 64 px (EuroSAT, Tiny-ImageNet), 100 epochs.

    Command:  python pipelines/finetune.py mixmae_swin_64px_finetune_100ep --pretrained RUN --data LABELLED
    Expected: not yet run.
    """
    return _finetune(SWIN_64PX, FinetuneAugmentConfig(crop_scale=(0.3, 1.0)), MixupConfig())


def mixmae_swin_96px_400ep() -> PretrainConfig:
    """MixMAE of images of 96 px (STL-10), 400 epochs.

    Command:  python pipelines/pretrain.py mixmae_swin_96px_400ep --data FOLDER_OF_IMAGES --output DIR
    Hardware: one GPU; hours here: not yet run.
    Expected: not yet run.
    """
    return _pretrain(SWIN_96PX, epochs=400, smallest_crop=0.2)


def mixmae_swin_96px_finetune_100ep() -> FinetuneConfig:
    """Classification of images of 96 px (STL-10), 100 epochs.

    Command:  python pipelines/finetune.py mixmae_swin_96px_finetune_100ep --pretrained RUN --data LABELLED
    Expected: not yet run.
    """
    return _finetune(SWIN_96PX, FinetuneAugmentConfig(crop_scale=(0.2, 1.0)), MixupConfig())


SMALL_RECIPES: dict[Callable[[], PretrainConfig], Callable[[], FinetuneConfig]] = {
    mixmae_swin_28px_grey_200ep: mixmae_swin_28px_grey_finetune_100ep,
    mixmae_swin_32px_800ep: mixmae_swin_32px_finetune_100ep,
    mixmae_swin_64px_400ep: mixmae_swin_64px_finetune_100ep,
    mixmae_swin_96px_400ep: mixmae_swin_96px_finetune_100ep,
}
"""Each pretraining with its finetuning."""
