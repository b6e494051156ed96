"""Finetuning a pretrained encoder, or training one from scratch, to classify images: the run as its workers see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.data.blocks import ImageBatch, eval_batches
from mixmae.data.classes import read_classes
from mixmae.data.images.mixup import mix_batch
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.finetune.classification import ImageClassifier, Mix, classification_step
from mixmae.jobs.config import FinetuneConfig
from mixmae.jobs.supervised import SupervisedJob
from mixmae.machine import local_processes, threads_per_process
from mixmae.metrics import UNKNOWN, label_ranks
from mixmae.probing.features import NoImages, predict_logits
from mixmae.step import StepOutput
from mixmae.training.failures import TrainingStopped

EVAL_BATCH = 64
"""Images that a worker evaluates at once."""


@dataclass(frozen=True, kw_only=True)
class ClassificationJob(SupervisedJob):
    """An encoder with a linear head on its pooled features; the whole validation set is evaluated."""

    stage = "finetune"
    doing = "Finetuning"
    best_metric = "val/top1"
    figures = ("top1", "top5", "loss")

    config: FinetuneConfig

    @classmethod
    def read_classes(cls, source: Source, validation: Source, config: FinetuneConfig) -> Sequence[str]:
        return read_classes(source, validation)

    def build_model(self) -> nn.Module:
        return self.with_initial(ImageClassifier(build_encoder(self.config.sized_encoder()), self.num_classes))

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        images = self.images_on_device(model, batch.images)
        mix, smoothing = self._mix, self.config.mixup.label_smoothing
        if (batch.labels == UNKNOWN).all():  # nothing to learn, but all workers must take the same steps
            nothing = {} if mix else {"top1": torch.zeros((), device=images.device)}
            return StepOutput(loss=0.0 * model(images).float().sum(), metrics=nothing)
        return classification_step(
            model, images, batch.labels, generator, first_sample, mix=mix, label_smoothing=smoothing
        )

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """Loss, top-1 and top-5 of the whole validation set, of which each worker evaluates its part."""
        config = self.config
        device = next(model.parameters()).device
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1, top-5
        rows = np.array_split(np.arange(self.validation.num_rows), num_workers)[rank]
        if len(rows):  # decoded in this process: a task of Ray's could wait for the CPU that this worker holds
            with ThreadPoolExecutor(threads_per_process(local_processes(num_workers))) as pool:
                batches = eval_batches(
                    self.validation,
                    config.augment.image_size,
                    batch_size=EVAL_BATCH,
                    rows=rows,
                    crop_pct=config.crop_pct,
                    channels=config.encoder.in_channels,
                    pool=pool,
                )
                on = torch.autocast(device.type, torch.bfloat16, enabled=config.loop.precision == "bfloat16")
                with on, contextlib.suppress(NoImages):  # all images of this worker's part are broken
                    logits, labels = predict_logits(
                        model, self._noting_broken(batches), mean=config.pixel_mean, std=config.pixel_std
                    )
                    known = labels != UNKNOWN
                    sums = _sums(logits[known], labels[known]).to(device)
        if num_workers > 1:
            dist.all_reduce(sums)
        count, loss, top1, top5 = sums.tolist()
        if not count:
            raise TrainingStopped(
                f"No image of {self.validation.name} that has a class could be decoded: pipelines/stats.py names the "
                "broken ones; repair them, or leave the validation set out, so that training images are held out."
            )
        return {"val/loss": loss / count, "val/top1": top1 / count, "val/top5": top5 / count}

    def _noting_broken(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        for batch in batches:
            self.broken.update({record.where: record for record in batch.broken})
            yield batch

    @cached_property
    def _mix(self) -> Mix | None:
        mixup, num_classes = self.config.mixup, self.num_classes
        if not (mixup.probability and (mixup.mixup or mixup.cutmix)):
            return None
        return lambda images, labels, generator: mix_batch(mixup, images, labels, num_classes, generator)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(4,) float64: images, sum of the cross entropy, images with the class first, and among the first five."""
    ranks = label_ranks(logits, labels)
    ranks[logits.isnan().any(dim=1)] = max(5, logits.shape[1])  # a model that has diverged is never right
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([torch.tensor(float(len(labels))).double(), loss, (ranks < 1).sum(), (ranks < 5).sum()])
