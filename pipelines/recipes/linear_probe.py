"""Linear probing of frozen encoders: MAE's settings for ImageNet-1K, and settings for a small set."""

from __future__ import annotations

from collections.abc import Callable

from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.encoders.build import EncoderConfig
from mixmae.encoders.swin import swin_base
from mixmae.jobs.config import FinetuneConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig
from pipelines.recipes.demo import demo


def demo_linear() -> FinetuneConfig:
    """A linear layer on the demo's frozen encoder: seconds if cached, else minutes.

    AdamW instead of LARS, whose steps are too short to move the layer far on a few thousand images (small_set_probe in
    mixmae/probing/fit.py has figures).

    Command:  python pipelines/linear_probe.py demo_linear --pretrained runs/demo --cached
    """
    pretraining = demo()
    return _probe(
        pretraining.encoder,
        image_size=pretraining.augment.size[0],
        crop_scale=(0.5, 1.0),
        optim=OptimConfig(optimizer="adamw", base_lr=0.01, weight_decay=0.0),
        loop=LoopConfig(epochs=20, warmup_epochs=2, batch_size=256, micro_batch_size=64, log_every_steps=20),
    )


def mixmae_swin_base_linear_90ep() -> FinetuneConfig:
    """A linear layer on a frozen Swin-B/W14, 90 epochs of ImageNet-1K.

    Command:  python pipelines/linear_probe.py mixmae_swin_base_linear_90ep --pretrained RUN --data IMAGENET_SHARDS
        --output DIR --workers 8
    Hardware: 8 GPUs; hours here: not yet run.
    Expected: 71.0 % top-1 after 600 epochs of pretraining, 63.8 % after 300 (paper, table 2). Ours: not yet run.
    Source:   MAE, appendix A (linear probing): LARS, base rate 0.1, no weight decay, momentum 0.9, batch 16384, 90
        epochs, 10 of warmup, random resized crop and flip; a batch norm without parameters before the layer. The paper
        of MixMAE does not print its settings. The batch norm takes its statistics from each micro-batch.
    """
    return _probe(
        swin_base(),
        crop_scale=(0.08, 1.0),
        optim=OptimConfig(
            optimizer="lars",
            base_lr=0.1,  # per 256 images: the peak is 6.4
            weight_decay=0.0,
            betas=(0.9, 0.95),  # the first is LARS's momentum; it has no second
        ),
        loop=LoopConfig(
            epochs=90,
            warmup_epochs=10,
            batch_size=16384,
            micro_batch_size=512,  # images per GPU at once
            precision="bfloat16",
        ),
    )


def _probe(
    encoder: EncoderConfig,
    *,
    image_size: int = 224,
    crop_scale: tuple[float, float],
    optim: OptimConfig,
    loop: LoopConfig,
) -> FinetuneConfig:
    """What linear probes have in common: random crops and flips alone, labels without smoothing."""
    return FinetuneConfig(
        encoder=encoder,
        augment=FinetuneAugmentConfig(
            image_size=image_size, crop_scale=crop_scale, flip=0.5, num_operations=0, erasing=0.0
        ),
        mixup=MixupConfig(mixup=0.0, cutmix=0.0, label_smoothing=0.0),
        optim=optim,
        loop=loop,
    )


LINEAR_PROBE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe for recipe in (demo_linear, mixmae_swin_base_linear_90ep)
}
