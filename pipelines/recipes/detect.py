"""The paper's detection and instance segmentation of COCO (tables 4 and 13 to 16), and one for everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixmae.data.images.detect_augment import DetectAugmentConfig
from mixmae.detection.config import DetectorConfig
from mixmae.encoders.swin import SwinConfig, swin_base, swin_large, with_dense_windows
from mixmae.jobs.config import DetectConfig
from mixmae.training.loop import LoopConfig
from mixmae.training.optim import OptimConfig
from pipelines.recipes.demo import demo

Recipe = Callable[[], DetectConfig]


def demo_detect() -> DetectConfig:
    """Find the objects of the built-in scenes with the demo's very small Swin: minutes on two CPU cores.

    Images are of 128 px, twice the pretraining's. The heads are small, and so are the numbers of proposals: a scene
    has four objects at most.

    Command:  make detect, or python pipelines/detect.py demo_detect --pretrained runs/demo
    """
    return DetectConfig(
        encoder=replace(demo().encoder, image_size=128),
        augment=DetectAugmentConfig(image_size=128, scale=(0.6, 1.5)),
        detector=DetectorConfig(
            fpn_dim=64,
            anchor_sizes=(16, 32, 64, 128),
            anchor_ratios=(1.0,),
            rpn_convs=1,
            box_convs=0,
            box_dim=128,
            mask_convs=2,
            rpn_samples=64,
            proposals_before_nms=(300, 300),
            proposals=100,
            roi_samples=64,
            mask_samples=16,
            detections=20,
        ),
        optim=OptimConfig(lr=1e-3, layer_decay=0.9, layer_decay_rule="timm", betas=(0.9, 0.999)),
        loop=LoopConfig(epochs=2, warmup_epochs=0.2, steps=500, batch_size=8, log_every_steps=50, schedule="step"),
    )


def paper_detect(encoder: SwinConfig, *, epochs: int, layer_decay: float, drop_path: float) -> DetectConfig:
    """Mask R-CNN on COCO as far as it is known.

    The paper gives the input (1024 px, large-scale jitter of 0.1 to 2), the windows, the epochs, the step schedule, the
    warmup of a quarter of an epoch and the layer decay. It refers to MAE's training, which is that of Li et al. 2021:
    batches of 64, AdamW with a weight decay of 0.1 and a rate of 8e-5, drop path 0.1 (B) and 0.3 (L). The steps, at
    8/9 and 0.963 of the run, are ViTDet's.
    """
    return DetectConfig(
        encoder=replace(with_dense_windows(encoder), image_size=1024, drop_path=drop_path),
        optim=OptimConfig(
            lr=8e-5, weight_decay=0.1, betas=(0.9, 0.999), layer_decay=layer_decay, layer_decay_rule="timm"
        ),
        loop=LoopConfig(
            epochs=epochs,
            warmup_epochs=0.25,
            batch_size=64,
            precision="bfloat16",
            schedule="step",
            log_every_steps=50,
            evaluate_every_epochs=5,
        ),
    )


def mixmae_swin_base_coco_55ep() -> DetectConfig:
    """Mask R-CNN on Swin-B/W14, 55 epochs of COCO.

    Command:  python pipelines/detect.py mixmae_swin_base_coco_55ep --pretrained RUN --data COCO_SHARDS --output DIR
        --workers 8, with shards that make_shards made of COCO 2017
    Hardware: 8 GPUs of 80 GB, eight images each; about 25 EFLOP, hours here: not yet run.
    Expected: AP of boxes / masks 52.3 / 46.4 after 300 epochs of pretraining, 52.7 / 47.0 after 600 (paper, table 4,
        K = 4). Of the ablations (300 epochs, K = 2): mix 51.5 / 45.9, zeros 51.0 / 45.3, a learnable token 50.9 / 45.1,
        shuffled 46.5 / 41.6, zoom 47.9 / 42.6; K = 3 51.6 / 45.9, 5 51.4 / 45.4; [MASK] at 75 % 51.2 / 45.4; 600 and
        900 epochs of K = 2 52.2 / 46.5 and 52.4 / 46.7; one reconstruction 50.0 / 44.4 (tables 13 to 16). Ours: not
        yet run.
    Source:   docs/detection.md lists where each setting comes from.
    """
    return paper_detect(swin_base(), epochs=55, layer_decay=0.85, drop_path=0.1)


def mixmae_swin_large_coco_80ep() -> DetectConfig:
    """Mask R-CNN on Swin-L/W14, 80 epochs of COCO.

    Command, hardware and source: as mixmae_swin_base_coco_55ep.
    Expected: AP of boxes / masks 54.3 / 48.2 after 600 epochs of pretraining (paper, table 4). Ours: not yet run.
    """
    return paper_detect(swin_large(), epochs=80, layer_decay=0.9, drop_path=0.3)


DETECT_RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (demo_detect, mixmae_swin_base_coco_55ep, mixmae_swin_large_coco_80ep)
}
