"""What all jobs have in common. A job is a run as its workers see it: the TrainingJob of mixmae.training.worker.

The driver builds it once, with its class's method `of`, before there is an MLflow run; `replace(job, run=...)` adds
that. A sweep builds one job, too, of which `of_trial` makes those of its trials. Jobs are pickled to the workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from mixmae.data.account import Account, account
from mixmae.data.blocks import BrokenRecord
from mixmae.data.order import Plan
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder, config_to_json
from mixmae.flops import count_macs, count_parameters
from mixmae.jobs.config import RunConfig, to_json
from mixmae.jobs.record import DataRecord, versions
from mixmae.machine import to_device
from mixmae.share import WorkerShare
from mixmae.step import StepOutput
from mixmae.tracking import JournalTracker, RunRef, run_of
from mixmae.training.loop import Batch, LoopConfig, TrainState
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength

PLAIN_NAMES = {
    "optim.weight_decay": "weight_decay",
    "optim.layer_decay": "layer_decay",
    "encoder.drop_path": "drop_path",
    "loop.epochs": "epochs",
    "loop.batch_size": "batch_size",
    "loop.seed": "seed",
}
"""Fields that MLflow's runs of any task also have under a name without dots, as a number, to be compared by."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run without its model and its evaluation."""

    stage: ClassVar[str]
    """What MLflow's tag `stage` calls such runs."""
    doing: ClassVar[str]
    """What the terminal calls it: "Pretraining"."""

    config: RunConfig
    source: Source
    """Training images."""
    data: DataRecord
    """The same as it was recorded when the run was begun."""
    folder: Path
    """Of the run."""
    run: RunRef | None = None
    """The MLflow run; None if MLflow was away when training began."""

    @property
    def ref(self) -> RunRef | None:
        """The MLflow run, or None as long as there is none."""
        return run_of(self.folder) or self.run

    @property
    def sources(self) -> dict[str, Source]:
        """What the run reads, by what it is for."""
        return {"training": self.source}

    @cached_property
    def account(self) -> Account:
        """What was met in the sources."""
        return account(self.sources)

    @property
    def loop(self) -> LoopConfig:
        return self.config.loop

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def length(self) -> RunLength:
        return self.config.length(self.source.num_rows)

    @property
    def ema_decay(self) -> float | None:
        return None

    @property
    def best(self) -> tuple[str, Path] | None:
        return None

    @property
    def params(self) -> dict[str, Any]:
        """MLflow's parameters: all fields of the config, and the numbers that runs of any task are compared by."""
        sized = self.config.sized_encoder()
        with torch.device("meta"):
            encoder = build_encoder(sized)
        assert isinstance(encoder, nn.Module)
        size = self.config.augment.image_size
        plain = {name: attrgetter(field)(self.config) for field, name in PLAIN_NAMES.items()}
        return {
            **to_json(self.config),
            "encoder": config_to_json(sized),
            **plain,
            "layer_decay": 1.0 if plain["layer_decay"] is None else plain["layer_decay"],
            "lr": self.optim.peak_lr(self.loop.batch_size),
            "steps": self.length.total_steps,
            "image_size": size if isinstance(size, int) else size[0],
            "data.window_rows": self.data.window_rows,
            "params_m": round(count_parameters(encoder) / 1e6, 3),
            "gmacs": round(count_macs(encoder, size, in_channels=sized.in_channels).total / 1e9, 3),
        }

    @property
    def tags(self) -> dict[str, str]:
        """MLflow's tags."""
        return {"stage": self.stage}

    def of_trial(self, config: RunConfig, folder: Path) -> Self:
        """The job of a sweep's trial: the same data, another config and folder."""
        data = replace(self.data, window_rows=config.window_rows_for(self.source.exact_reads))
        return replace(self, config=config, folder=folder, data=data)

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        raise NotImplementedError

    def final_metrics(self, state: TrainState) -> dict[str, float]:
        """What MLflow and run.json have of a finished run, in one number each: final/*, and best/* where it is kept."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> Mapping[str, float]:
        return {}

    def evaluate_untrained(self, model: nn.Module, *, rank: int, num_workers: int) -> Mapping[str, float]:
        return {}

    def draw_curves(self, evaluations: Sequence[Mapping[str, float]]) -> None:
        """Draw the curves of the run, its `pictures`, in the driver, after each evaluation.

        Args: evaluations: the metrics of all so far, each with its `step`.
        """

    @property
    def pictures(self) -> Mapping[str, str]:
        """What draw_curves draws: the titles in MLflow of files in the run's folder."""
        return {}

    def left_out(self, *, rank: int) -> Sequence[BrokenRecord]:
        return []

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        return None, {}

    def share(self, *, rank: int, num_workers: int) -> WorkerShare:
        return self.config.share(rank=rank, num_workers=num_workers)

    @contextlib.contextmanager
    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> Iterator[Iterator[Batch]]:
        from mixmae.data.streams import TrainStream  # only workers read, so only they need Ray Data

        share = self.share(rank=rank, num_workers=num_workers)
        plan = Plan(chunk_sizes=self.source.chunk_sizes, seed=self.config.loop.seed, window_rows=self.data.window_rows)
        stream = TrainStream(
            self.source,
            plan,
            self.config.augment,
            share=share,
            start_step=start_step,
            stop_step=self.length.total_steps,
            channels=self.config.encoder.in_channels,
            config=self.config.stream,
        )
        with contextlib.closing(stream):
            yield iter(stream)

    def open_tracker(self) -> JournalTracker:
        return JournalTracker(self.folder)

    def describe(self) -> dict[str, Any]:
        """What every checkpoint has beside the position: config, data, versions and, if there is one, MLflow run."""
        ref = self.ref
        return {
            "config": to_json(self.config),
            **({} if ref is None else {"mlflow": vars(ref)}),
            "data": vars(self.data),
            "versions": versions(),
        }

    def images_on_device(self, model: nn.Module, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> normalised float32 on the model's device."""
        device = next(model.parameters()).device
        return self.config.normalise(*to_device((images,), device))
