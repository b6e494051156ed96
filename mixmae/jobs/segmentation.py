"""Finetuning a pretrained encoder, or training one from scratch, to find the class of every pixel: a run as its workers
see it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.pairs import Pair, check_maps, read_pairs
from mixmae.data.source import DataError, Source
from mixmae.data.truth import dense_classes, with_maps
from mixmae.encoders.build import build_encoder
from mixmae.flops import count_macs, count_parameters
from mixmae.jobs.config import SegmentConfig
from mixmae.jobs.segmenter import Segmenter, segmenter_of
from mixmae.jobs.supervised import WORST, WORST_FILE, SupervisedJob
from mixmae.machine import local_processes, threads_per_process
from mixmae.segmentation.pictures import Shown, segmentation_panel
from mixmae.segmentation.scores import PixelScores, count_pixels, pixel_scores
from mixmae.segmentation.step import IGNORE, segmentation_step, unpack_targets
from mixmae.segmentation.upernet import UPerNet
from mixmae.step import StepOutput
from mixmae.tracking import JournalTracker
from mixmae.training.failures import TrainingStopped
from mixmae.writing import writing, writing_table

EVAL_IMAGES = 16
"""Images that a worker evaluates at once."""
PANEL_IMAGES = 8
"""Validation images that a panel shows, spread over the set: the same at each evaluation."""
CURVES = 32
"""Most classes that get a curve of their own; all are in classes.csv."""
CLASSES_FILE = "classes.csv"


@dataclass(frozen=True, kw_only=True)
class SegmentationJob(SupervisedJob):
    """A UPerNet on an encoder; the whole validation set is evaluated, at its own size."""

    stage = "segment"
    doing = "Segmenting"
    best_metric = "val/miou"
    figures = ("miou", "macc", "aacc", "loss")
    default_data = "scenes"

    config: SegmentConfig

    @classmethod
    def read_classes(cls, source: Source, validation: Source, config: SegmentConfig) -> Sequence[str]:
        for images in (source, validation):
            check_maps(with_maps(images), config.loop.is_hopeless)
        ours, theirs = dense_classes(source), dense_classes(validation)
        assert ours is not None
        assert theirs is not None
        assert ours.pixels is not None
        if ours.pixels != theirs.pixels:
            raise DataError(f"{source.name} and {validation.name} have other classes: pack them as one set.")
        return ours.pixels

    @property
    def uniform_loss(self) -> float:
        return super().uniform_loss * (1 + self.config.head.aux_weight)

    @property
    def params(self) -> dict[str, Any]:
        """Beside the encoder's, the parameters and MACs of the whole model, without the auxiliary head's MACs."""
        with torch.device("meta"):
            model = UPerNet(build_encoder(self.config.sized_encoder()), self.num_classes, self.config.head).eval()
        size, channels = self.config.augment.image_size, self.config.encoder.in_channels
        return {
            **super().params,
            "model_params_m": round(count_parameters(model) / 1e6, 3),
            "model_gmacs": round(count_macs(model, size, in_channels=channels).total / 1e9, 3),
        }

    @property
    def pictures(self) -> Mapping[str, str]:
        return {CLASSES_FILE: "IoU and accuracy of each class", WORST_FILE: "the images with the most wrong pixels"}

    def build_model(self) -> nn.Module:
        model = UPerNet(build_encoder(self.config.sized_encoder()), self.num_classes, self.config.head)
        if dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in dist.get_backend():
            # Torch has no batch norm over several workers for CPUs: there each has the statistics of its own images.
            return self.with_initial(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        return self.with_initial(model)

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        images = self.images_on_device(model, batch.images)
        targets = unpack_targets(batch.targets, self.config.augment.size).to(images.device, non_blocking=True)
        return segmentation_step(model, images, targets, aux_weight=self.config.head.aux_weight)

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """mIoU, mean and overall accuracy and loss of all pixels of the validation set, of which each worker evaluates
        its part; of up to CURVES classes the IoU, too. Rank 0 writes classes.csv and worst.png."""
        if num_workers > 1:  # rank 0's statistics of batch norms are those that are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        segmenter = segmenter_of(model, self.config, self.classes)
        confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=segmenter.device)
        loss = torch.zeros((), dtype=torch.float64, device=segmenter.device)
        worst: list[tuple[float, int]] = []
        rows = np.array_split(np.arange(self.validation.num_rows), num_workers)[rank]
        with ThreadPoolExecutor(threads_per_process(local_processes(num_workers))) as pool:
            for pairs in self._pairs(rows, pool):
                counted, summed, shares = judge(segmenter, pairs)
                confusion += counted
                loss += summed
                worst = sorted([*worst, *zip(shares, (pair.row for pair in pairs), strict=True)])[:WORST]
        if num_workers > 1:
            dist.all_reduce(confusion)
            dist.all_reduce(loss)
            parts: list[Any] = [None] * num_workers
            dist.all_gather_object(parts, worst)
            worst = sorted(item for part in parts for item in part)[:WORST]
        if not confusion.sum():
            raise TrainingStopped(
                f"No image of {self.validation.name} could be used, or none of its pixels has a class: repair it, or "
                "leave the validation set out, so that training images are held out."
            )
        scores = pixel_scores(confusion.cpu())
        if rank == 0:
            self._write_classes(scores)
            self._draw_worst(segmenter, [row for _, row in worst])
        figures = {
            "val/loss": loss.item() / int(confusion.sum()),
            "val/miou": scores.miou,
            "val/macc": scores.macc,
            "val/aacc": scores.aacc,
        }
        if self.num_classes <= CURVES:
            names = [re.sub(r"[^\w. -]", "_", name) for name in self.classes]
            named = zip(names, scores.iou.tolist(), strict=True)
            figures |= {f"iou/{name}": value for name, value in named if not math.isnan(value)}
        return figures

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """Truth beside prediction, and where they differ, of the same validation images each time."""
        if not self._shown:
            return None, {}
        return panel_of(segmenter_of(model, self.config, self.classes), self._shown), {}

    def open_tracker(self) -> JournalTracker:
        return JournalTracker(self.folder, panel="segmentation")

    @cached_property
    def _shown(self) -> list[Pair]:
        count = self.validation.num_rows
        rows = np.unique(np.linspace(0, count - 1, min(PANEL_IMAGES, count)).astype(np.int64))
        return [pair for pairs in self._pairs(rows, None) for pair in pairs]

    def _pairs(self, rows: Int64Array, pool: ThreadPoolExecutor | None) -> Iterator[list[Pair]]:
        """Validation images that can be used, in batches; the others are noted."""
        channels = self.config.encoder.in_channels
        for batch in read_pairs(with_maps(self.validation), rows, channels=channels, batch_size=EVAL_IMAGES, pool=pool):
            self.broken.update({item.where: item for item in batch if isinstance(item, BrokenRecord)})
            yield [item for item in batch if isinstance(item, Pair)]

    def _draw_worst(self, segmenter: Segmenter, rows: Sequence[int]) -> None:
        """Draw images, in the order of the rows."""
        pairs = {pair.row: pair for part in self._pairs(np.array(sorted(rows)), None) for pair in part}
        with writing(self.folder / WORST_FILE) as partial:
            panel_of(segmenter, [pairs[row] for row in rows if row in pairs]).save(partial)  # a file may be gone by now

    def _write_classes(self, scores: PixelScores) -> None:
        """IoU, accuracy and pixels of each class, as of the last evaluation."""
        with writing_table(self.folder / CLASSES_FILE) as table:
            write_classes(table, self.classes, scores)


def judge(segmenter: Segmenter, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, list[float]]:
    """Compare the model's classes with the truth.

    Returns: the confusion matrix (N, N) int64, and the sum of the cross entropy over pixels, both of these images; and
        of each image the share of its pixels that are right, 1 where none has a class.
    """
    num_classes = len(segmenter.class_names)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=segmenter.device)
    loss = torch.zeros((), dtype=torch.float64, device=segmenter.device)
    shares = torch.ones(len(pairs), dtype=torch.float64, device=segmenter.device)
    for index, (scores, pair) in enumerate(zip(segmenter.scores([pair.pixels for pair in pairs]), pairs, strict=True)):
        truth = torch.from_numpy(pair.indices).to(segmenter.device)
        counted = count_pixels(scores.argmax(dim=0), truth, num_classes)
        confusion += counted
        shares[index] = (counted.diagonal().sum().double() / counted.sum()).nan_to_num(1.0)
        loss += F.cross_entropy(scores[None], truth[None].long(), ignore_index=IGNORE, reduction="sum").double()
    return confusion, loss, shares.tolist()


def panel_of(segmenter: Segmenter, pairs: Sequence[Pair]) -> Image.Image:
    """Truth, prediction and errors of images."""
    found = segmenter.predict([pair.pixels for pair in pairs])
    shown = [Shown(pair.pixels, pair.indices, indices) for pair, indices in zip(pairs, found, strict=True)]
    return segmentation_panel(shown, segmenter.class_names)


def write_classes(table: Any, class_names: Sequence[str], scores: PixelScores) -> None:
    """Write the table of classes; what a class has no figure for stays empty.   Args: table: of csv.writer."""
    table.writerow(["class", "name", "pixels", "iou", "accuracy"])
    for index, name in enumerate(class_names):
        shares = ["" if math.isnan(value) else f"{value:.4f}" for value in (scores.iou[index], scores.accuracy[index])]
        table.writerow([index, name, int(scores.pixels[index]), *shares])
