"""Finetuning a pretrained encoder, or training one from scratch, to classify images: the run as its workers see it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.data.blocks import BrokenRecord, ImageBatch, eval_batches
from mixmae.data.broken import check_decoding
from mixmae.data.channels import check_channels, note_grey
from mixmae.data.classes import read_classes
from mixmae.data.images.mixup import mix_batch
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.finetune.classification import ImageClassifier, Mix, classification_step
from mixmae.jobs.config import FinetuneConfig
from mixmae.jobs.job import Job
from mixmae.jobs.record import DataRecord, Pretrained
from mixmae.machine import local_processes, threads_per_process
from mixmae.metrics import UNKNOWN, label_ranks
from mixmae.probing.features import NoImages, predict_logits
from mixmae.step import StepOutput
from mixmae.training.checkpoint import read_state
from mixmae.training.failures import TrainingStopped
from mixmae.training.loop import LoopConfig, TrainState

HELDOUT_IMAGES = 10_000
"""Most images that are held out of a set without a validation split; never more than a tenth of it."""
EVAL_BATCH = 64
"""Images that a worker evaluates at once."""
BEST_METRIC = "val/top1"
"""Its highest value decides which weights are the best."""
INITIAL_FILE = "initial.safetensors"
"""The pretrained encoder as it was loaded, in the folder of a run or of a sweep."""


@dataclass(frozen=True, kw_only=True)
class ClassificationJob(Job):
    """An encoder with a linear head on its pooled features; the whole validation set is evaluated."""

    stage = "finetune"
    doing = "Finetuning"

    config: FinetuneConfig
    validation: Source
    classes: Sequence[str]
    """Names of the classes."""
    pretrained: Pretrained | None
    """The weights that it starts from; None: from scratch."""
    initial: Path | None
    """The file of these weights, as keep_initial wrote it."""
    broken: dict[str, BrokenRecord] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Validation images that this worker could not decode, by their place: they are in no figure."""

    @classmethod
    def of(
        cls,
        config: FinetuneConfig,
        source: Source,
        validation: Source,
        *,
        data: str | None,
        folder: Path,
        pretrained: Pretrained | None,
    ) -> Self:
        """The job on these images.

        Args: data: what --data was.
        Raises: DataError for labels that will not do, and as check_decoding and check_channels.
        """
        for images in (source, validation):
            check_decoding(images, config.loop.is_hopeless)
        check_channels(source, config.encoder.in_channels)
        if pretrained is None:
            note_grey(source, config.encoder.in_channels)
        return cls(
            config=config,
            source=source,
            validation=validation,
            data=DataRecord.of(source, data, config),
            folder=folder,
            classes=read_classes(source, validation),
            pretrained=pretrained,
            initial=folder / INITIAL_FILE if pretrained else None,
        )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def sources(self) -> dict[str, Source]:
        return {"training": self.source, "validation": self.validation}

    @property
    def num_judged(self) -> int:
        return self.validation.num_rows

    @property
    def loop(self) -> LoopConfig:
        if self.config.divergence is None:
            return self.config.loop
        return replace(self.config.loop, max_loss=self.config.divergence * math.log(max(2, self.num_classes)))

    @property
    def ema_decay(self) -> float | None:
        return self.config.ema_decay

    @property
    def best(self) -> tuple[str, Path]:
        return BEST_METRIC, self.folder / "best"

    @property
    def params(self) -> dict[str, Any]:
        return {**super().params, "classes": self.num_classes}

    @property
    def tags(self) -> dict[str, str]:
        return {**super().tags, **(self.pretrained.tags if self.pretrained else {"pretrained": "none"})}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "classes": list(self.classes)}

    def build_model(self) -> nn.Module:
        model = ImageClassifier(build_encoder(self.config.sized_encoder()), self.num_classes)
        if self.initial is not None:
            initial = safetensors.torch.load_file(self.initial)
            model.load_state_dict(model.state_dict() | initial)
        return model

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

    def left_out(self, *, rank: int) -> list[BrokenRecord]:
        return list(self.broken.values())

    def _noting_broken(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        for batch in batches:
            self.broken.update({record.where: record for record in batch.broken})
            yield batch

    def final_metrics(self, state: TrainState) -> dict[str, float]:
        """final/* of the last evaluation, best/* of the best one, each top1, top5 and loss; and best/step."""
        best = read_state(self.best[1])
        numbers = {f"final/{name}": state.metrics[f"val/{name}"] for name in ("top1", "top5", "loss")}
        numbers |= {f"best/{name}": best["metrics"][f"val/{name}"] for name in ("top1", "top5", "loss")}
        return {**numbers, "best/step": float(best["position"]["step"])}

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
