"""Mask R-CNN on an encoder: pyramid, proposal network, box head, mask head.

The blocks are torchvision's; how they are put together is ours, because torchvision's model class resizes images
itself, does the arithmetic of boxes in whatever type autocast chose, and samples regions half a pixel off. Names of
modules are those of torchvision's maskrcnn_resnet50_fpn_v2: its heads' weights load.

Legend: B images, C channels, H W pixels of the canvas, P proposals, R regions of all images, N classes, S side of a
mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mixmae.detection.boxes import (
    BACKGROUND,
    ROI_WEIGHTS,
    RPN_WEIGHTS,
    decode_boxes,
    encode_boxes,
    level_anchors,
    match,
    sample,
)
from mixmae.detection.config import DetectorConfig, Norm
from mixmae.detection.losses import Losses, box_loss, class_loss, mask_loss, objectness_loss, proposal_recall
from mixmae.detection.pooler import pool_regions
from mixmae.encoders.base import Encoder
from mixmae.encoders.dense import StageNorms, freeze_final_norm
from mixmae.objects import Detections, Target

BOX_SIDE, MASK_SIDE = 7, 14
"""Sides of the grids that regions are sampled on, for the box head and for the mask head, which doubles its own."""
SMALLEST_PX = 1e-3
"""Proposals with a shorter side are left out."""


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each pixel of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0), width)


_NORMS: dict[Norm, Callable[..., nn.Module] | None] = {
    "batch": nn.BatchNorm2d,
    "layer": ChannelNorm,
    "group": _group_norm,
    "none": None,
}


class Pyramid(nn.Module):
    """The encoder's outputs at one width, each with what the coarser ones know; and one level more where it is wanted.

    Args: channels: widths of the stages.  num_levels: of the pyramid (DetectorConfig.strides).
    """

    def __init__(self, channels: Sequence[int], num_levels: int, config: DetectorConfig) -> None:
        super().__init__()
        used = list(channels[config.first_stage :])
        top = LastLevelMaxPool() if num_levels > len(used) else None
        self.first_stage = config.first_stage
        self.fpn = FeaturePyramidNetwork(used, config.fpn_dim, top, _NORMS[config.norm])

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """(B, channels[s], H, W) of each stage -> (B, fpn_dim, H, W) of each level."""
        return list(self.fpn({str(index): stage for index, stage in enumerate(stages[self.first_stage :])}).values())


class RoIHeads(nn.Module):
    """The heads that look at regions: class and box, and mask."""

    def __init__(self, num_classes: int, config: DetectorConfig) -> None:
        super().__init__()
        dim, norm = config.fpn_dim, _NORMS[config.norm]
        size = (dim, BOX_SIDE, BOX_SIDE)
        self.box_head = FastRCNNConvFCHead(size, [dim] * config.box_convs, [config.box_dim], norm_layer=norm)
        self.box_predictor = FastRCNNPredictor(config.box_dim, num_classes + 1)  # background is class 0
        if config.masks:
            self.mask_head = MaskRCNNHeads(dim, [dim] * config.mask_convs, 1, norm_layer=norm)
            self.mask_predictor = MaskRCNNPredictor(dim, dim, num_classes + 1)
        # d2's: the heads' first guesses are the background and the proposal itself.
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        for layer in (self.box_predictor.cls_score, self.box_predictor.bbox_pred):
            nn.init.zeros_(layer.bias)

    def boxes(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> scores (R, N + 1) and offsets (R, N + 1, 4), float32."""
        scores, offsets = self.box_predictor(self.box_head(_at_least_one(regions)))
        return scores.float()[: len(regions)], offsets.float().unflatten(1, (-1, 4))[: len(regions)]

    def masks(self, regions: Tensor) -> Tensor:
        """(R, C, 14, 14) -> (R, N + 1, 28, 28) logits, float32."""
        return self.mask_predictor(self.mask_head(_at_least_one(regions))).float()[: len(regions)]


def _at_least_one(regions: Tensor) -> Tensor:
    """The same regions, or an empty one where there are none.

    Batch norms cannot do with nothing, and every worker of several has to call them, with gradients for all parameters.
    """
    return regions if len(regions) else regions.new_zeros(1, *regions.shape[1:])


class Rpn(nn.Module):
    """The proposal network's convolutions."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.head = RPNHead(config.fpn_dim, len(config.anchor_ratios), conv_depth=config.rpn_convs)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Score and correct the anchors of each level: (B, A) logits and (B, A, 4) offsets, float32."""
        logits, offsets = self.head(list(levels))
        return (
            [level.float().permute(0, 2, 3, 1).flatten(1) for level in logits],
            # (B, ratios * 4, H, W): the four numbers of an anchor lie side by side
            [level.float().permute(0, 2, 3, 1).reshape(level.shape[0], -1, 4) for level in offsets],
        )


class Detector(nn.Module):
    """Find the objects of the given classes.

    Args: encoder: built, of two or more stages that each halve the grid.  num_classes: of objects, at least 1.
    Raises: ValueError for an encoder without a pyramid, or settings that do not fit it.
    """

    def __init__(self, encoder: Encoder, num_classes: int, config: DetectorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DetectorConfig()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        strides = encoder.strides
        if len(strides) < 2 or any(second != 2 * first for first, second in pairwise(strides)):
            raise ValueError(
                f"detection needs an encoder of several stages, each with half the resolution of the one before; the "
                f"strides of this one are {strides}: choose a Swin, PVT, Twins or ResNet"
            )
        self.num_classes = num_classes
        self.strides = config.strides(strides)
        self.num_stages = len(strides) - config.first_stage
        self.encoder = encoder
        freeze_final_norm(encoder)
        self.stage_norms = StageNorms(encoder.channels) if config.stage_norms else None
        self.backbone = Pyramid(encoder.channels, len(self.strides), config)
        self.rpn = Rpn(config)
        self.roi_heads = RoIHeads(num_classes, config)
        self._freeze_unused()

    def dense(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What is computed for every pixel: levels of the pyramid, and the proposal network's logits and offsets.

        Args: images: (B, in_channels, H, W), normalised.
        Returns: for each level (B, fpn_dim, H, W), (B, A) and (B, A, 4).
        """
        stages = self.encoder.features(images)
        if self.stage_norms is not None:
            stages = self.stage_norms(stages)
        levels = self.backbone(stages)
        return levels, *self.rpn(levels)

    def forward(self, images: Tensor, targets: Sequence[Target], seed: int) -> Losses:
        """Compute the losses of a batch.

        Args: images: (B, in_channels, H, W), normalised.  targets: of each.  seed: of what is drawn for the first
            image; the next one's is one more, so that the draws do not depend on how a batch is cut.
        Source: as detectron2: absolute (L1) losses of boxes, over all that was sampled; objects among the proposals.
        """
        config, device = self.config, images.device
        levels, logits, offsets = self.dense(images)
        anchors = self.anchors(levels)
        proposals = self.propose(logits, offsets, anchors, [target.size for target in targets])
        generators = [torch.Generator(device).manual_seed(seed + index) for index in range(len(images))]

        losses = objectness_loss(
            torch.cat(logits, dim=1), torch.cat(offsets, dim=1), torch.cat(anchors), targets, generators, config
        )
        recall = proposal_recall(proposals, targets)

        regions, owners = [], []
        for boxes, target, generator in zip(proposals, targets, generators, strict=True):
            with_objects = torch.cat([boxes, target.boxes])
            matched = match(with_objects, target.boxes, config.roi_iou, config.roi_iou)
            drawn = torch.cat(sample(matched, config.roi_samples, config.roi_positive, generator))
            regions.append(with_objects[drawn])
            owners.append(matched[drawn])
        labels = torch.cat([self._labels(target, owner) for target, owner in zip(targets, owners, strict=True)])
        objects = torch.cat([self._objects(target, owner) for target, owner in zip(targets, owners, strict=True)])
        used = levels[: self.num_stages]
        scores, corrections = self.roi_heads.boxes(pool_regions(used, regions, self.strides[: len(used)], BOX_SIDE))
        positive = torch.nonzero(labels > 0)[:, 0]
        right = scores[positive].argmax(dim=1) == labels[positive]
        losses |= {
            "cls": class_loss(scores, labels),
            "box": box_loss(
                corrections[positive, labels[positive]],
                encode_boxes(objects[positive], torch.cat(regions)[positive], ROI_WEIGHTS),
                len(labels),
            ),
        }
        metrics = {
            "proposal_recall": recall,
            "positives": labels.new_tensor(len(positive) / len(images), dtype=torch.float32),
            "object_accuracy": right.float().sum() / max(1, len(positive)),
        }
        if config.masks:
            chosen = [torch.nonzero(owner >= 0)[:, 0][: config.mask_samples] for owner in owners]
            regions = [region[index] for region, index in zip(regions, chosen, strict=True)]
            owners = [owner[index] for owner, index in zip(owners, chosen, strict=True)]
            pooled = pool_regions(used, regions, self.strides[: len(used)], MASK_SIDE)
            losses["mask"] = mask_loss(self.roi_heads.masks(pooled), regions, owners, targets)
        return Losses(losses, metrics)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Find the objects of a batch.

        Args: images: (B, in_channels, H, W), normalised.  sizes: (h, w) of each, the part of the canvas that it fills.
        Returns: of each image, in pixels of the canvas.
        """
        levels, logits, offsets = self.dense(images)
        proposals = self.propose(logits, offsets, self.anchors(levels), sizes)
        used = levels[: self.num_stages]
        strides = self.strides[: len(used)]
        scores, corrections = self.roi_heads.boxes(pool_regions(used, proposals, strides, BOX_SIDE))
        counts = [len(boxes) for boxes in proposals]
        parts = zip(proposals, scores.softmax(dim=1).split(counts), corrections.split(counts), sizes, strict=True)
        found = [self._best(*part) for part in parts]
        if not self.config.masks:
            return [Detections(*parts, None) for parts in found]
        scored = self.roi_heads.masks(pool_regions(used, [boxes for boxes, _, _ in found], strides, MASK_SIDE))
        labels = torch.cat([labels for _, _, labels in found])
        masks = scored[torch.arange(len(labels), device=labels.device), labels + 1].sigmoid()
        each = masks.split([len(boxes) for boxes, _, _ in found])
        return [Detections(*objects, mask) for objects, mask in zip(found, each, strict=True)]

    def anchors(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level, (A, 4) float32.   Args: levels: of the pyramid."""
        return [
            level_anchors(
                size, self.config.anchor_ratios, (level.shape[2], level.shape[3]), stride, device=level.device
            )
            for size, level, stride in zip(self.config.anchor_sizes, levels, self.strides, strict=True)
        ]

    @torch.no_grad()
    def propose(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """The best boxes of the proposal network.

        Args: logits, offsets: of each level, as `dense` gives them.  anchors: likewise.  sizes: (h, w) of each image.
        Returns: for each image (P, 4) float32, the surest first.
        """
        most = self.config.proposals_before_nms[0 if self.training else 1]
        boxes, scores, levels = [], [], []
        for index, (score, offset, anchor) in enumerate(zip(logits, offsets, anchors, strict=True)):
            best, chosen = score.detach().topk(min(most, score.shape[1]), dim=1)  # (B, K)
            offset = offset.detach().gather(1, chosen[..., None].expand(-1, -1, 4))
            boxes.append(decode_boxes(offset, anchor[chosen], RPN_WEIGHTS))
            scores.append(best)
            levels.append(torch.full_like(chosen, index))
        found = []
        for box, score, level, size in zip(
            torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels, dim=1), sizes, strict=True
        ):
            box = clip_boxes_to_image(box, size)
            whole = ((box[:, 2:] - box[:, :2]) >= SMALLEST_PX).all(dim=1) & score.isfinite()
            box, score, level = box[whole], score[whole], level[whole]
            found.append(box[batched_nms(box, score, level, self.config.proposal_nms_iou)[: self.config.proposals]])
        return found

    def _best(
        self, proposals: Tensor, scores: Tensor, corrections: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of an image's detections.

        Args: proposals: (P, 4).  scores: (P, N + 1), background first.  corrections: (P, N + 1, 4).
        """
        boxes = decode_boxes(corrections[:, 1:], proposals[:, None].expand(-1, self.num_classes, -1), ROI_WEIGHTS)
        rows, labels = torch.nonzero(scores[:, 1:] > self.config.score_threshold, as_tuple=True)
        boxes = clip_boxes_to_image(boxes[rows, labels], size)
        scores = scores[rows, labels + 1]
        whole = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_PX).all(dim=1)
        boxes, scores, labels = boxes[whole], scores[whole], labels[whole]
        best = batched_nms(boxes, scores, labels, self.config.nms_iou)[: self.config.detections]
        return boxes[best], scores[best], labels[best]

    def _labels(self, target: Target, owner: Tensor) -> Tensor:
        """Class of each region, 0 for background."""
        if not len(target.labels):
            return torch.zeros_like(owner)
        return torch.where(owner == BACKGROUND, 0, target.labels[owner.clamp(min=0)] + 1)

    def _objects(self, target: Target, owner: Tensor) -> Tensor:
        """Box of each region's object; any box for background."""
        if not len(target.labels):
            return owner.new_zeros((len(owner), 4), dtype=torch.float32)
        return target.boxes[owner.clamp(min=0)]

    def _freeze_unused(self) -> None:
        """Stop training what no loss reaches: norms of stages that are not in the pyramid."""
        if self.stage_norms is not None:
            for stage in range(self.config.first_stage):
                self.stage_norms.get_submodule(f"norm{stage}").requires_grad_(False)
