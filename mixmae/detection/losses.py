"""What a detector's predictions cost, and what one of its training steps computes.

Legend: B images, A anchors of an image, G objects, R regions, S side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from mixmae.detection.boxes import RPN_WEIGHTS, encode_boxes, match, sample
from mixmae.detection.config import DetectorConfig
from mixmae.objects import Target
from mixmae.step import StepOutput

RECALL_IOU = 0.5
POSITIVE_SHARE = 0.5
"""Largest share of the anchors that the proposal network learns from that are objects'."""


class Losses(NamedTuple):
    """What a batch gives. A tuple, so that distributed training finds the tensors in it."""

    parts: dict[str, Tensor]
    """rpn_obj, rpn_box, cls, box, and mask where there are masks: scalars with gradients."""
    metrics: dict[str, Tensor]
    """Detached scalars. proposal_recall: share of objects that a proposal overlaps by a half (1 without objects);
    positives: regions of objects per image; object_accuracy: share of them whose class is right."""


def objectness_loss(
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    targets: Sequence[Target],
    generators: Sequence[torch.Generator],
    config: DetectorConfig,
) -> dict[str, Tensor]:
    """The proposal network's losses, sums over the anchors that are sampled divided by how many it should be.

    Args: logits: (B, A).  offsets: (B, A, 4).  anchors: (A, 4).
    Returns: rpn_obj, rpn_box.
    """
    objectness, box = logits.sum() * 0, offsets.sum() * 0
    for score, offset, target, generator in zip(logits, offsets, targets, generators, strict=True):
        matched = match(anchors, target.boxes, *config.rpn_iou, keep_best=True)
        positive, background = sample(matched, config.rpn_samples, POSITIVE_SHARE, generator)
        chosen = torch.cat([positive, background])
        wanted = (torch.arange(len(chosen), device=score.device) < len(positive)).float()
        objectness = objectness + F.binary_cross_entropy_with_logits(score[chosen], wanted, reduction="sum")
        if len(positive):
            correction = encode_boxes(target.boxes[matched[positive]], anchors[positive], RPN_WEIGHTS)
            box = box + F.l1_loss(offset[positive], correction, reduction="sum")
    scale = config.rpn_samples * len(targets)
    return {"rpn_obj": objectness / scale, "rpn_box": box / scale}


def class_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of regions.   Args: scores: (R, N + 1).  labels: (R,) int64, 0 = background."""
    return F.cross_entropy(scores, labels, reduction="sum") / max(1, len(labels))


def box_loss(offsets: Tensor, wanted: Tensor, count: int) -> Tensor:
    """Distance of the offsets of objects' regions.   Args: offsets, wanted: (R, 4).  count: of all regions sampled."""
    return F.l1_loss(offsets, wanted, reduction="sum") / max(1, count)


def mask_loss(logits: Tensor, regions: Sequence[Tensor], owners: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Mean binary cross entropy of the masks of objects' regions, each for its own class; 0 where there is no object.

    Args: logits: (R, N + 1, S, S), background first.  regions: B tensors (R_b, 4).  owners: (R_b,) int64 each.
    """
    if not len(logits):
        return logits.sum() * 0
    labels = torch.cat([target.labels[owner] for target, owner in zip(targets, owners, strict=True)])
    wanted = torch.cat([mask_targets(*parts, logits.shape[-1]) for parts in zip(targets, regions, owners, strict=True)])
    own = logits[torch.arange(len(labels), device=labels.device), labels + 1]
    return F.binary_cross_entropy_with_logits(own, wanted)


@torch.no_grad()
def mask_targets(target: Target, regions: Tensor, owners: Tensor, side: int) -> Tensor:
    """What each region shows of its object.

    Args: regions: (R, 4).  owners: (R,).   Returns: (R, side, side) in 0, 1.
    """
    if not len(owners):
        return regions.new_zeros(0, side, side)
    places = torch.cat([owners[:, None].float(), regions], dim=1)
    read = roi_align(target.masks[:, None].float(), places, side, 1.0, sampling_ratio=0, aligned=True)
    return (read[:, 0] >= 0.5).float()


@torch.no_grad()
def proposal_recall(proposals: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Share of the objects of a batch that a proposal overlaps by at least RECALL_IOU; 1 if there are none."""
    hits = [
        box_iou(target.boxes, boxes).max(dim=1).values >= RECALL_IOU
        for boxes, target in zip(proposals, targets, strict=True)
        if len(target.boxes) and len(boxes)
    ]
    total = sum(len(target.boxes) for target in targets)
    device = targets[0].boxes.device
    if not total:
        return torch.ones((), device=device)
    found = torch.cat(hits).float().sum() if hits else torch.zeros((), device=device)
    return found / total


def detection_step(
    model: nn.Module, images: Tensor, targets: Sequence[Target], generator: torch.Generator, first_sample: int
) -> StepOutput:
    """Compute the losses of a batch; the loss is their sum.

    Args:
        model: a Detector, wrapped by DDP or not.
        images: (B, C, H, W) float, normalised.  targets: of each.
        generator: of the step, on the CPU.  first_sample: index of the batch's first image in the global batch.
    """
    seed = int(torch.randint(2**62, (), generator=generator)) + first_sample
    parts, metrics = model(images, targets, seed)
    return StepOutput(
        loss=torch.stack(list(parts.values())).sum(),
        metrics={**{f"loss/{name}": value.detach() for name, value in parts.items()}, **metrics},
    )
