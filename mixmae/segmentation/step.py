"""What one training step of segmentation computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.segmentation.upernet import resized
from mixmae.step import StepOutput

IGNORE = 255
"""The target of pixels that are in no loss and in no figure (as mixmae.data.truth)."""


def segmentation_step(
    model: nn.Module, images: Tensor, targets: Tensor, *, aux_weight: float, num_pixels: Tensor | None = None
) -> StepOutput:
    """Compute the mean cross entropy of the pixels that are not ignored.

    Args:
        model: a UPerNet, wrapped by DDP or not.
        images: (B, C, H, W) float, normalised.  targets: (B, H, W) int64, IGNORE where no class is asked.
        aux_weight: of the auxiliary head's loss.
        num_pixels: what the sum over pixels is divided by, where that is not the number of this batch's own: with
            several workers their mean number, so that the mean of their losses is the mean over all pixels.
    Returns: the loss; `loss_main`, `loss_aux` and `pixel_accuracy`. A batch of ignored pixels alone has the loss 0.
    Source: the mean is torch's, over pixels that count. Older segmentation code divides by all pixels.
    """
    scores, auxiliary = model(images, with_auxiliary=True)
    counted = targets != IGNORE
    own = counted.sum()
    number = (own if num_pixels is None else num_pixels).clamp(min=1)
    scores = resized(scores, targets.shape[-2:]).float()
    main = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="sum") / number
    right = ((scores.detach().argmax(dim=1) == targets) & counted).sum() / own.clamp(min=1)
    metrics = {"loss_main": main.detach(), "pixel_accuracy": right}
    loss = main
    if auxiliary is not None:
        auxiliary = resized(auxiliary, targets.shape[-2:]).float()
        aux = F.cross_entropy(auxiliary, targets, ignore_index=IGNORE, reduction="sum") / number
        metrics["loss_aux"] = aux.detach()
        loss = main + aux_weight * aux
    return StepOutput(loss=loss, metrics=metrics)


def unpack_targets(targets: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
    """The targets of a batch as the data plane packs them, as (B, H, W) int64."""
    return torch.stack([target.view(size) for target in targets]).long()
