"""The run that everybody can make: minutes on two CPU cores."""

from __future__ import annotations

from mixmae.data.augment import AugmentConfig
from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig
from pipelines.recipes.config import PretrainConfig


def demo() -> PretrainConfig:
    """MixMAE of a very small Swin on images of 96 px: a few minutes on two CPU cores.

    Two images a mix, as in the paper's ablations: an image of 96 px has only nine 32 px cells, too few for the default
    of four. Small batches and a high rate, because minutes on a CPU are few steps.

    Command:  make pretrain, or python pipelines/pretrain.py demo --data FOLDER_OF_IMAGES
    Expected: on the built-in shapes the loss falls from 1.06 to 0.66 (held-out 0.656, two cores, 2026-11-23): colours,
    and the beginning of edges. Smoother pictures are reconstructed sooner (docs/LOG.md).
    """
    return PretrainConfig(
        encoder=SwinConfig(
            image_size=96, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=(12, 12, 6, 3)
        ),
        method=MixMAEConfig(num_images=2, decoder=DecoderConfig(dim=96, depth=2, num_heads=4)),
        augment=AugmentConfig(image_size=96, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(base_lr=0.016),
        loop=LoopConfig(epochs=10, warmup_epochs=1, steps=1600, batch_size=16, log_every_steps=100),
    )
