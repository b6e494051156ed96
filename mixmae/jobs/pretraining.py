"""A pretraining run as its workers see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import nn

from mixmae.data.blocks import BrokenRecord, ImageBatch, eval_batches
from mixmae.data.broken import check_decoding
from mixmae.data.channels import check_channels, note_grey
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.job import Job
from mixmae.jobs.probe import Probe, choose_probe
from mixmae.jobs.record import DataRecord
from mixmae.methods.build import build_method
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from mixmae.probing.online import draw_probe
from mixmae.step import StepOutput
from mixmae.training.loop import TrainState, step_seed
from mixmae.writing import writing

PANEL_IMAGES = 6
"""Images that a panel shows: in mixes of each K other ones, as many as these make, but at least one."""
HELDOUT_IMAGES = 60
"""Held-out images that the reconstruction loss is measured on; a multiple of 2, 3, 4 and 5."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob(Job):
    """MixMAE, SimMIM or MAE on an encoder; judged by the loss of held-out images and by a probe."""

    stage = "pretrain"
    doing = "Pretraining"

    config: PretrainConfig
    heldout: Source
    probe: Probe | None = None

    @classmethod
    def of(cls, config: PretrainConfig, source: Source, heldout: Source, *, data: str | None, folder: Path) -> Self:
        """The job on these images; prints what it cannot measure on them.

        Args: data: what --data was.   Raises: DataError as check_decoding and check_channels.
        """
        check_decoding(source, config.loop.is_hopeless)
        check_channels(source, config.encoder.in_channels)
        note_grey(source, config.encoder.in_channels)
        if heldout.num_rows < config.method.images_mixed:
            print(
                f"note: {heldout.num_rows} held-out images are fewer than a mix takes: no panels and no held-out loss"
            )
        return cls(
            config=config,
            source=source,
            heldout=heldout,
            data=DataRecord.of(source, data, config),
            folder=folder,
            probe=choose_probe(config.probe, source, heldout),
        )

    @property
    def num_judged(self) -> int:
        """Images of the probe."""
        return 0 if self.probe is None else len(self.probe.rows)

    @property
    def tags(self) -> dict[str, str]:
        return {**super().tags, "probe": self.probe.description if self.probe else "none"}

    def build_model(self) -> nn.Module:
        return build_method(build_encoder(self.config.sized_encoder()), self.config.method)

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        return model(self.images_on_device(model, batch.images), generator=generator, first_sample=first_sample)

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """The probe. (The loss of the held-out images comes with the panel, from rank 0 alone.)"""
        if self.probe is None:
            return {}
        return self.probe.measure(model, self.config, rank=rank, num_workers=num_workers)

    def evaluate_untrained(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """The probe, and its references."""
        if self.probe is None:
            return {}
        return self.probe.measure_untrained(model, self.config, rank=rank, num_workers=num_workers)

    def draw_curves(self, evaluations: Sequence[Mapping[str, float]]) -> None:
        """probe.png: MLflow's own charts do not put the references beside a curve."""
        if self.probe is not None:
            with writing(self.folder / "probe.png") as partial:  # it may be on its way to MLflow
                draw_probe(evaluations, partial)

    @property
    def pictures(self) -> Mapping[str, str]:
        return {"probe.png": "kNN and linear probe beside the untrained encoder"} if self.probe is not None else {}

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """Some mixes of held-out images with their reconstructions, and heldout/loss; nothing without such images."""
        num_images = self.config.method.images_mixed
        whole = self._heldout.images
        images = self.images_on_device(model, whole[: len(whole) // num_images * num_images])
        if not len(images):
            return None, {}
        shown = images[: max(1, PANEL_IMAGES // num_images) * num_images]
        mixes = cyclic_partners(len(shown), num_images)[::num_images]
        chosen = {"partners": mixes} if num_images > 1 else {}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.loop.precision == "bfloat16"):
            generator = torch.Generator().manual_seed(step_seed(0, "heldout"))
            loss = model(images, generator=generator).loss.item()
            generator = torch.Generator().manual_seed(step_seed(0, "panel"))
            pictures = model(shown, generator=generator, with_pictures=True, **chosen).pictures
        panel = reconstruction_panel(pictures, mean=self.config.pixel_mean, std=self.config.pixel_std)
        return panel, {"heldout/loss": loss}

    def final_metrics(self, state: TrainState) -> dict[str, float]:
        """final/loss and, where measured, final/heldout_loss, final/knn_top1 and final/linear_top1."""
        names = {"loss": "loss", "heldout/loss": "heldout_loss"}
        names |= {"probe/knn_top1": "knn_top1", "probe/linear_top1": "linear_top1"}
        return {f"final/{name}": state.metrics[key] for key, name in names.items() if key in state.metrics}

    @property
    def sources(self) -> dict[str, Source]:
        return {"training": self.source, "held-out": self.heldout}

    def left_out(self, *, rank: int) -> list[BrokenRecord]:
        """Of the probe, and on rank 0 of the held-out images."""
        records = [*(self.probe.broken.values() if self.probe else ()), *(self._heldout.broken if rank == 0 else ())]
        return list({record.where: record for record in records}.values())

    @cached_property
    def _heldout(self) -> ImageBatch:
        """The first images of the held-out set."""
        rows = np.arange(min(HELDOUT_IMAGES, self.heldout.num_rows))
        size, channels = self.config.augment.image_size, self.config.encoder.in_channels
        return next(eval_batches(self.heldout, size, batch_size=len(rows), rows=rows, channels=channels))


def check_method(config: PretrainConfig) -> None:
    """See that the encoder can do what the method needs.   Raises: ValueError."""
    with torch.device("meta"):
        build_method(build_encoder(config.sized_encoder()), config.method)
