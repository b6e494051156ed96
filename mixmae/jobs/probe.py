"""The probe of pretraining: labelled images that the encoder is judged on at each evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.data.blocks import BrokenRecord, ImageBatch, eval_batches
from mixmae.data.chunks import Int64Array
from mixmae.data.source import DataError, Source
from mixmae.encoders.base import Encoder
from mixmae.jobs.config import RunConfig
from mixmae.machine import local_processes, threads_per_process
from mixmae.probing.features import extract_features
from mixmae.probing.online import OnlineProbeConfig, choose_images, probe_features
from mixmae.training.failures import EvaluationSkipped

PROBE_BATCH = 64
"""Images of a worker's part of the probe that go through the encoder at once."""
PIXELS = 16
"""Sides, in pixels, of the small images that the encoder's features are compared with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """The images, and how they are judged."""

    source: Source
    rows: Int64Array
    k: int
    """Neighbours that vote in kNN."""
    num_classes: int
    broken: dict[str, BrokenRecord] = field(default_factory=dict)
    """Those of this worker's images that could not be used, by their place: they are in no figure."""

    @property
    def description(self) -> str:
        """The images in a few words."""
        return f"{len(self.rows)} images of {self.num_classes} classes of {self.source.name}"

    def measure(self, model: nn.Module, config: RunConfig, *, rank: int, num_workers: int) -> dict[str, float]:
        """Classify the images by the encoder's features, all workers together.

        Workers share the images: a separate process would compete for the same cores or GPU. Images are decoded once
        per run, and nothing is drawn from a global generator: the weights stay as they would be without the probe.

        Args: model: its `encoder` is judged.
        Returns: probe/knn_top1 and probe/linear_top1, in 0..1, and perf/probe_s; the same on all workers.
        Raises: EvaluationSkipped, on all workers, if any of them fails: this never ends a pretraining.
        """
        start = time.perf_counter()
        metrics, _ = self._classify(lambda: self._features(model, config, rank, num_workers), num_workers)
        return {**metrics, "perf/probe_s": time.perf_counter() - start}

    def measure_untrained(
        self, model: nn.Module, config: RunConfig, *, rank: int, num_workers: int
    ) -> dict[str, float]:
        """Measure an untrained encoder, and what else the features of a trained one should surpass.

        Returns: of measure, the same as reference/knn_untrained and reference/linear_untrained; reference/knn_pixels
            and reference/linear_pixels, of the images' own pixels, 16 x 16 of them, in place of features; and
            reference/chance, the share that guesses would hit.
        Raises: as measure.
        """
        untrained = self.measure(model, config, rank=rank, num_workers=num_workers)
        pixels, num_classes = self._classify(lambda: self._pixels(config, rank, num_workers), num_workers)
        named = {
            f"reference/{kind}_{what}": metrics[f"probe/{kind}_top1"]
            for what, metrics in (("untrained", untrained), ("pixels", pixels))
            for kind in ("knn", "linear")
        }
        return {**untrained, **named, "reference/chance": 1 / num_classes}

    def _classify(self, compute: Callable[[], tuple[Tensor, Tensor]], num_workers: int) -> tuple[dict[str, float], int]:
        """Classify all workers' images.

        Args: compute: this worker's features and labels.
        Returns: the metrics, and the number of classes.
        """
        share: tuple[Tensor, Tensor] | str
        try:
            share = compute()
        except Exception as error:  # the others wait for this share: send them the reason instead
            share = f"{type(error).__name__}: {error}"
        shares: list[Any] = [share]
        if num_workers > 1:
            shares = [None] * num_workers
            dist.all_gather_object(shares, share)
        failed = next((part for part in shares if isinstance(part, str)), None)
        if failed is not None:
            raise EvaluationSkipped(f"no probe ({failed})")
        features, labels = (torch.cat([part[kind] for part in shares]) for kind in (0, 1))
        if not len(labels):
            raise EvaluationSkipped(f"no probe (none of its {len(self.rows)} images could be decoded)")
        try:
            return probe_features(features, labels, self.k), len(labels.unique())
        except (ValueError, RuntimeError) as error:
            raise EvaluationSkipped(f"no probe ({error})") from error

    def _pixels(self, config: RunConfig, rank: int, num_workers: int) -> tuple[Tensor, Tensor]:
        """This worker's part: pixels (n, C*16*16), normalised, and labels (n,)."""
        batches = self._batches(config, rank, num_workers)
        if not batches:
            return torch.empty(0, len(config.pixel_mean) * PIXELS**2), torch.empty(0, dtype=torch.int64)
        small = [F.adaptive_avg_pool2d(config.normalise(batch.images), PIXELS).flatten(1) for batch in batches]
        return torch.cat(small), torch.cat([batch.labels for batch in batches])

    def _features(self, model: nn.Module, config: RunConfig, rank: int, num_workers: int) -> tuple[Tensor, Tensor]:
        """This worker's part: features (n, D) and labels (n,)."""
        encoder = model.encoder
        assert isinstance(encoder, Encoder)
        device = next(model.parameters()).device
        batches = self._batches(config, rank, num_workers)
        if not batches:  # more workers than images
            return torch.empty(0, encoder.channels[-1]), torch.empty(0, dtype=torch.int64)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.precision == "bfloat16"):
            return extract_features(encoder, batches, mean=config.pixel_mean, std=config.pixel_std)

    def _batches(self, config: RunConfig, rank: int, num_workers: int) -> list[ImageBatch]:
        """This worker's images, those that decode."""
        batches = _decoded(self, config.augment.size, config.encoder.in_channels, rank, num_workers)
        self.broken.update({record.where: record for batch in batches for record in batch.broken})
        return [batch for batch in batches if len(batch.images)]


@lru_cache(maxsize=1)
def _decoded(probe: Probe, size: tuple[int, int], channels: int, rank: int, num_workers: int) -> list[ImageBatch]:
    """A worker's images, decoded once and kept in its memory: 2000 of 224 px are 300 MB over all workers."""
    rows = np.array_split(probe.rows, num_workers)[rank]
    with ThreadPoolExecutor(threads_per_process(local_processes(num_workers))) as pool:
        return list(eval_batches(probe.source, size, batch_size=PROBE_BATCH, rows=rows, channels=channels, pool=pool))


def choose_probe(config: OnlineProbeConfig, source: Source, heldout: Source) -> Probe | None:
    """Choose the images of the probe, or print why there is none.

    They are held-out ones; where these give less than a quarter of what is asked for, the training images, whose
    classes pretraining does not see.
    """
    if config.images == 0:
        return None
    best: Probe | None = None
    for part in (heldout, source):
        try:
            labels = part.read_labels() if part.has_labels else np.full(part.num_rows, -1)
        except (DataError, OSError) as error:
            print(f"note: no probe (the labels of {part.name} cannot be read: {error})")
            return None
        rows = choose_images(labels, config.images)
        if best is None or len(rows) > len(best.rows):
            best = Probe(source=part, rows=rows, k=config.k, num_classes=len(np.unique(labels[rows])))
        if len(best.rows) >= config.images / 4:
            break
    assert best is not None
    if len(best.rows) <= config.k:
        few = f"only {len(best.rows)} images" if len(best.rows) else "no two classes"
        print(f"note: no probe by classes ({few} with labels to judge by)")
        return None
    print(f"probe: kNN and a linear layer on {best.description} (chance level: {1 / best.num_classes:.1%})")
    return best
