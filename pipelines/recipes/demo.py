"""The run that everybody can make: minutes on two CPU cores."""

from __future__ import annotations

from mixmae.data.images.augment import AugmentConfig
from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig
from mixmae.jobs.config import PretrainConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig


def demo() -> PretrainConfig:
    """MixMAE of a very small Swin on 64 px images: minutes on two CPU cores.

    What counts on a CPU is how many images it sees. 64 px in patches of 4 px are 256 tokens and 16 mask cells of 16 px:
    enough cells to mix four images, as the paper does. Three stages of width 32 learn more in the same minutes than two
    of width 48 do (docs/LOG.md).

    Command:  make pretrain, or python pipelines/pretrain.py demo --data FOLDER_OF_IMAGES
    """
    return PretrainConfig(
        encoder=SwinConfig(
            image_size=64, patch_px=4, embed_dim=32, depths=(1, 1, 2), num_heads=(1, 2, 4), window_sizes=(8, 8, 4)
        ),
        method=MixMAEConfig(num_images=4, decoder=DecoderConfig(dim=64, depth=1, num_heads=2)),
        augment=AugmentConfig(image_size=64, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(base_lr=0.016),  # the peak is 2e-3
        loop=LoopConfig(
            epochs=20, warmup_epochs=1, steps=1500, batch_size=32, log_every_steps=100, evaluate_every_epochs=3
        ),
    )
