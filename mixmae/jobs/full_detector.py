"""A detector whose heads have as much to do as they ever have: what a plan counts and measures.

How long a training step of Mask R-CNN takes, and what it holds, follows from the data in three places: how many objects
an image has, which proposals are left by the suppression of doubles, and how many of these are objects'. Here each
image has NUM_OBJECTS, and its proposals suffice for all regions that the heads learn from. All else is the detector's
and its loss's own code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from mixmae.detection.config import DetectorConfig
from mixmae.detection.losses import detection_step
from mixmae.detection.model import BOX_SIDE, MASK_SIDE, Detector
from mixmae.objects import Target

NUM_OBJECTS = 8
"""Objects of each image; COCO's have 7 on average. More of them take more memory: a mask of the canvas's size each."""


class FullDetector(Detector):
    """A Detector that also runs on tensors without values: its anchors and proposals always have some."""

    def anchors(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The same anchors, with values."""
        with unset_fake_temporarily():
            return super().anchors([torch.empty(0, 0, *level.shape[2:]) for level in levels])

    def propose(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """The boxes of objects and of background, in the shares that the heads ask for.   Args: as of Detector."""
        if not isinstance(logits[0], FakeTensor):
            super().propose(logits, offsets, anchors, sizes)  # the time that it takes
        with unset_fake_temporarily():
            return [_proposals(size, self.config) for size in sizes]


class FullForward(nn.Module):
    """What has MACs in a training step's forward: to be counted on the meta device.   Args: detector: to be run."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> None:
        """Args: images: (B, C, H, W)."""
        config, heads = self.detector.config, self.detector.roi_heads
        levels, _, _ = self.detector.dense(images)
        num_boxes, num_masks = num_regions(config)
        heads.boxes(levels[0].new_empty(len(images) * num_boxes, config.fpn_dim, BOX_SIDE, BOX_SIDE))
        if num_masks:
            heads.masks(levels[0].new_empty(len(images) * num_masks, config.fpn_dim, MASK_SIDE, MASK_SIDE))


def num_regions(config: DetectorConfig) -> tuple[int, int]:
    """The most regions of an image that the box head and the mask head learn from."""
    objects = int(config.roi_samples * config.roi_positive)
    masks = objects if config.mask_samples is None else min(objects, config.mask_samples)
    return config.roi_samples, masks if config.masks else 0


def full_loss(model: nn.Module, images: Tensor) -> Tensor:
    """The loss of a training step.   Args: model: a FullDetector.  images: (B, C, H, W), normalised."""
    height, width = images.shape[2:]
    with unset_fake_temporarily():
        targets = [full_target((height, width)) for _ in images]
    return detection_step(model, images, targets, torch.Generator().manual_seed(0), 0).loss


def full_target(size: tuple[int, int]) -> Target:
    """Objects one above the other in an image's left half."""
    (height, width), step = size, size[0] / NUM_OBJECTS
    boxes = torch.tensor([[0, index * step, width / 2, (index + 1) * step] for index in range(NUM_OBJECTS)])
    masks = torch.zeros(NUM_OBJECTS, height, width, dtype=torch.bool)
    return Target(boxes, torch.zeros(NUM_OBJECTS, dtype=torch.int64), masks, size)


def _proposals(size: tuple[int, int], config: DetectorConfig) -> Tensor:
    """The boxes of full_target again and again, and a square of their area in the right half, where there is nothing.
    On a CPU, a region takes longer to look at the larger it is."""
    objects = int(config.proposals * config.roi_positive)
    right = torch.tensor([size[1] / 2, 0.0, 3 * size[1] / 4, size[0] / 4])
    return torch.cat(
        [
            full_target(size).boxes[torch.arange(objects) % NUM_OBJECTS],
            right.expand(config.proposals - objects, 4),
        ]
    )
