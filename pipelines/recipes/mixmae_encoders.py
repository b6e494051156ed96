"""MixMAE of encoders other than Swin: PVT and Twins (table 3), ViT (table 17), ResNet v2 (table 19).

Hyperparameters are those of Swin (paper_run): the paper names no others.
"""

from __future__ import annotations

from mixmae.encoders.pvt import pvt_large
from mixmae.encoders.resnetv2 import resnetv2_50x3, resnetv2_101x3
from mixmae.encoders.twins import twins_svt_large
from mixmae.encoders.vit import vit_base
from mixmae.jobs.config import PretrainConfig
from pipelines.recipes.mixmae_swin import paper_run


def mixmae_pvt_large_600ep() -> PretrainConfig:
    """MixMAE, PVT-L, 600 epochs of ImageNet-1K.

    Command:  python pipelines/pretrain.py mixmae_pvt_large_600ep --data IMAGENET_SHARDS --output DIR --workers 8
    Hardware: 8 GPUs of 80 GB; hours here: not yet run.
    Expected: 83.4 % top-1 on ImageNet-1K after finetuning (paper, table 3; its text says 83.2). Ours: not yet run.
    """
    return paper_run(pvt_large(), epochs=600)


def mixmae_twins_svt_large_600ep() -> PretrainConfig:
    """MixMAE, Twins-SVT-L, 600 epochs of ImageNet-1K.

    Command and hardware: as mixmae_pvt_large_600ep.
    Expected: 83.9 % top-1 on ImageNet-1K after finetuning (paper, table 3). Ours: not yet run.
    """
    return paper_run(twins_svt_large(), epochs=600)


def mixmae_vit_base_600ep() -> PretrainConfig:
    """MixMAE, ViT-B/16, 600 epochs of ImageNet-1K.

    The paper does not say how it mixes for a ViT. Here: in cells of 32 px, as for pyramids, and without a class token.

    Command and hardware: as mixmae_pvt_large_600ep; micro-batches of 64 images per GPU.
    Expected: 83.8 % top-1 on ImageNet-1K after finetuning (paper, table 17). Ours: not yet run.
    """
    return paper_run(vit_base(), epochs=600, micro_batch_size=64)


def mixmae_resnetv2_50x3_600ep() -> PretrainConfig:
    """MixMAE, ResNet-50x3 (v2), 600 epochs of ImageNet-1K.

    The paper states no length for this encoder: it is the default of section 4. The paper says that the input size is
    half of BiT's: it is the default of 224 px.

    Command and hardware: as mixmae_pvt_large_600ep; micro-batches of 16 images per GPU.
    Expected: 81.8 % top-1 on ImageNet-1K after finetuning (paper, table 19). Ours: not yet run.
    """
    return paper_run(resnetv2_50x3(), epochs=600, micro_batch_size=16)


def mixmae_resnetv2_101x3_600ep() -> PretrainConfig:
    """MixMAE, ResNet-101x3 (v2), 600 epochs of ImageNet-1K.

    Length and input size: as mixmae_resnetv2_50x3_600ep.

    Command and hardware: as mixmae_resnetv2_50x3_600ep.
    Expected: 82.6 % top-1 on ImageNet-1K after finetuning (paper, table 19). Ours: not yet run.
    """
    return paper_run(resnetv2_101x3(), epochs=600, micro_batch_size=16)
