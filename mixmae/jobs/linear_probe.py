"""A linear layer on a frozen encoder: the run as its workers see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.classification import ClassificationJob
from mixmae.probing.linear import LinearHead, LinearProbe


@dataclass(frozen=True, kw_only=True)
class LinearProbeJob(ClassificationJob):
    """A finetuning whose encoder stays as it is."""

    stage = "linear_probe"
    doing = "Probing"

    def build_model(self) -> nn.Module:
        model = super().build_model()
        assert isinstance(model, ImageClassifier)
        return LinearProbe(model.encoder, LinearHead(model.head.in_features, self.num_classes))

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """As finetuning does, with the batch norm's statistics of rank 0, which are those that are saved."""
        if num_workers > 1:
            for buffer in model.head.buffers():  # type: ignore[union-attr]
                dist.broadcast(buffer, src=0)
        return super().evaluate(model, rank=rank, num_workers=num_workers)
