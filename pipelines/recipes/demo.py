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
    """MixMAE of a very small Swin at 128 px: a few minutes on two CPU cores.

    Command:  make pretrain, or python pipelines/pretrain.py demo --data FOLDER_OF_IMAGES
    """
    return PretrainConfig(
        encoder=SwinConfig(
            image_size=128, embed_dim=32, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 8), window_sizes=(8, 8, 8, 4)
        ),
        method=MixMAEConfig(num_images=4, decoder=DecoderConfig(dim=128, depth=2, num_heads=4)),
        augment=AugmentConfig(image_size=128),
        optim=OptimConfig(base_lr=2e-3),
        loop=LoopConfig(epochs=10, warmup_epochs=1, steps=800, batch_size=64),
    )
