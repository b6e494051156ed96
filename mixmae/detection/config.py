"""The settings of a detector; the defaults are those of the paper's COCO results.

Source: the paper says "Mask R-CNN", with the training setup of MAE's, which is that of Li et al. 2021 ("Benchmarking
detection transfer learning with vision transformers"), and prints 701 G of computation for Swin-B: with the heads below
ours is 700.6 G, with the usual ones (an RPN of one convolution, a box head of two linear layers) 586 G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Norm = Literal["batch", "layer", "group", "none"]
"""Of the pyramid's and the heads' convolutions; the RPN has none. batch: over all workers on GPUs, over a worker's own
images on CPUs. layer: over the channels of each pixel. group: 32 groups, or as many as divide the width."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Mask R-CNN with a feature pyramid."""

    fpn_dim: int = 256
    """Width of the pyramid and of the heads' convolutions."""
    first_stage: int = 0
    """The first stage of the encoder that is in the pyramid, counted from 0; a later one saves much computation and
    loses the smallest objects."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors of each level. One number more than the encoder has stages in the pyramid gives one
    level more, of half the last one's resolution, for proposals alone."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors of each level."""
    rpn_convs: int = 2
    """Convolutions of the proposal network before its predictions."""
    box_convs: int = 4
    """Convolutions of the box head, before its linear layer."""
    box_dim: int = 1024
    """Width of the box head's linear layer."""
    mask_convs: int = 4
    """Convolutions of the mask head, before it doubles the resolution."""
    masks: bool = True
    """Predict masks, too; without, this is Faster R-CNN."""
    norm: Norm = "batch"
    """Norm of the pyramid's and the heads' convolutions."""
    stage_norms: bool = True
    """A layer norm on each of the encoder's outputs."""

    rpn_iou: tuple[float, float] = (0.3, 0.7)
    """An anchor is background below the first overlap with all objects, and an object's from the second on."""
    rpn_samples: int = 256
    """Anchors of each image that the proposal network learns from, at most half of them objects'."""
    proposals_before_nms: tuple[int, int] = (2000, 1000)
    """Best anchors of each level that become proposals, in training and afterwards."""
    proposals: int = 1000
    """Proposals of each image."""
    proposal_nms_iou: float = 0.7
    """Of two proposals that overlap more, the better one stays."""
    roi_iou: float = 0.5
    """A proposal belongs to an object that it overlaps at least so much."""
    roi_samples: int = 512
    """Proposals of each image that the heads learn from."""
    roi_positive: float = 0.25
    """Largest share of them that are objects'."""
    mask_samples: int | None = None
    """Objects' proposals of each image that the mask head learns from, at most; None: all."""
    score_threshold: float = 0.05
    """Least score of a detection."""
    nms_iou: float = 0.5
    """Of two detections of one class that overlap more, the better one stays."""
    detections: int = 100
    """Detections of each image, at most."""

    def __post_init__(self) -> None:
        for name in ("fpn_dim", "rpn_convs", "box_dim", "rpn_samples", "proposals", "roi_samples", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("box_convs", "mask_convs", "first_stage"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if min(self.proposals_before_nms) < 1 or (self.mask_samples is not None and self.mask_samples < 1):
            raise ValueError("proposals_before_nms and mask_samples must be at least 1")
        if (
            not self.anchor_sizes
            or min(self.anchor_sizes) < 1
            or not self.anchor_ratios
            or min(self.anchor_ratios) <= 0
        ):
            raise ValueError("anchor_sizes needs a side of at least 1 px for each level, anchor_ratios a ratio above 0")
        if not 0 <= self.rpn_iou[0] <= self.rpn_iou[1] <= 1:
            raise ValueError(f"rpn_iou is {self.rpn_iou}: give two overlaps with 0 <= first <= second <= 1")
        for name in ("proposal_nms_iou", "roi_iou", "roi_positive", "score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")

    def strides(self, encoder_strides: Sequence[int]) -> tuple[int, ...]:
        """Pixels between the points of each level.

        Args: encoder_strides: of the encoder's stages.
        Raises: ValueError if the sizes of the anchors do not fit these stages.
        """
        used = tuple(encoder_strides[self.first_stage :])
        if not used or len(self.anchor_sizes) not in (len(used), len(used) + 1):
            raise ValueError(
                f"anchor_sizes has {len(self.anchor_sizes)} levels, and the encoder has {len(encoder_strides)} stages, "
                f"of which first_stage={self.first_stage} leaves {len(used)}: give anchor_sizes {len(used)} numbers, "
                f"or {len(used) + 1} for a coarser level on top"
            )
        return used + tuple(2 * used[-1] for _ in range(len(self.anchor_sizes) - len(used)))
