"""MAE of plain ViTs, which the paper compares MixMAE with (tables 2, 4, 5 and 17)."""

from __future__ import annotations

from dataclasses import replace

from mixmae.encoders.vit import ViTConfig, vit_base, vit_large
from mixmae.jobs.config import PretrainConfig
from mixmae.methods.mae import MAEConfig
from mixmae.training.loop import LoopConfig


def mae_vit_base_1600ep() -> PretrainConfig:
    """MAE, ViT-B/16, 1600 epochs of ImageNet-1K.

    Command:  python pipelines/pretrain.py mae_vit_base_1600ep --data IMAGENET_SHARDS --output DIR --workers 8
    Hardware: 8 GPUs of 80 GB; hours here: not yet run.
    Expected: 83.6 % top-1 on ImageNet-1K after finetuning, 67.8 % by linear probing (paper, table 2, from MAE's). Ours:
    not yet run.
    """
    return _mae(vit_base(), micro_batch_size=256)


def mae_vit_large_1600ep() -> PretrainConfig:
    """MAE, ViT-L/16, 1600 epochs of ImageNet-1K.

    Command and hardware: as mae_vit_base_1600ep; micro-batches of 128 images a GPU.
    Expected: 85.9 % top-1 on ImageNet-1K after finetuning (paper, section 5.1, from MAE's). Ours: not yet run.
    """
    return _mae(vit_large(), micro_batch_size=128)


def _mae(encoder: ViTConfig, *, micro_batch_size: int) -> PretrainConfig:
    """MAE's paper and code: batch 4096, base lr 1.5e-4 for 256 images, a class token in the encoder."""
    return PretrainConfig(
        encoder=replace(encoder, class_token=True),
        method=MAEConfig(),
        loop=LoopConfig(epochs=1600, batch_size=4096, precision="bfloat16", micro_batch_size=micro_batch_size),
    )
