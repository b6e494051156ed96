"""What one training step of segmentation computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.segmentation.upernet import resized
from mixmae.step import StepOutput

IGNORE = 255
"""The target of pixels that are in no loss and in no figure (as mixmae.data.truth)."""


def segmentation_step(model: nn.Module, images: Tensor, targets: Tensor, *, aux_weight: float) -> StepOutput:
    """Compute the mean over images of the cross entropy of their pixels that are not ignored.

    Args:
        model: a UPerNet, wrapped by DDP or not.
        images: (B, C, H, W) float, normalised.  targets: (B, H, W) int64, IGNORE where no class is asked.
        aux_weight: of the auxiliary head's loss.
    Returns: the loss; `loss_main`, `loss_aux` and `pixel_accuracy`. An image of ignored pixels alone has the loss 0.
    Source: others take the mean over all pixels that count of a worker's batch, or over all. The mean over images is
        the same however a batch is cut into micro-batches and workers.
    """
    scores, auxiliary = model(images, with_auxiliary=True)
    counted = targets != IGNORE
    numbers = counted.sum(dim=(1, 2)).clamp(min=1)  # (B,)

    def mean_loss(scores: Tensor) -> Tensor:
        pixels = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")  # (B, H, W)
        return (pixels.sum(dim=(1, 2)) / numbers).mean()

    scores = resized(scores, targets.shape[-2:]).float()
    right = (scores.detach().argmax(dim=1) == targets) & counted
    loss = main = mean_loss(scores)
    metrics = {"loss_main": main.detach(), "pixel_accuracy": (right.sum(dim=(1, 2)) / numbers).mean()}
    if auxiliary is not None:
        aux = mean_loss(resized(auxiliary, targets.shape[-2:]).float())
        metrics["loss_aux"] = aux.detach()
        loss = main + aux_weight * aux
    return StepOutput(loss=loss, metrics=metrics)


def unpack_targets(targets: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
    """The targets of a batch as the data plane packs them, as (B, H, W) int64."""
    return torch.stack([target.view(size) for target in targets]).long()
