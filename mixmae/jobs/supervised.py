"""What jobs have in common that learn classes from labelled images, from a pretrained encoder or from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
from torch import nn

from mixmae.data.blocks import BrokenRecord
from mixmae.data.broken import check_decoding
from mixmae.data.channels import check_channels, note_grey
from mixmae.data.shards.plan import DEFAULT_SET
from mixmae.data.source import Source
from mixmae.jobs.config import SupervisedConfig
from mixmae.jobs.job import Job
from mixmae.jobs.record import DataRecord, Pretrained
from mixmae.training.checkpoint import read_state
from mixmae.training.loop import LoopConfig, TrainState

HELDOUT_IMAGES = 10_000
"""Most images that are held out of a set without a validation split; never more than a tenth of it."""
WORST, WORST_FILE = 20, "worst.png"
"""Most images of an evaluation that are shown because the model does worst on them, and the picture's file."""
INITIAL_FILE = "initial.safetensors"
"""The pretrained encoder as it was loaded, in the folder of a run or of a sweep."""


@dataclass(frozen=True, kw_only=True)
class SupervisedJob(Job):
    """A run with a validation set, whose best weights are kept."""

    best_metric: ClassVar[str]
    """Its highest value decides which weights are the best."""
    figures: ClassVar[tuple[str, ...]]
    """Names, under val/, of the metrics of an evaluation that final_metrics gives."""
    default_data: ClassVar[str] = DEFAULT_SET
    """The built-in set that is taken without --data."""

    config: SupervisedConfig
    validation: Source
    classes: Sequence[str]
    """Names of the classes."""
    pretrained: Pretrained | None
    """The weights that it starts from; None: from scratch."""
    initial: Path | None
    """The file of these weights, as keep_initial wrote it."""
    broken: dict[str, BrokenRecord] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Validation images that this worker could not use, by their place: they are in no figure."""

    @classmethod
    def of(
        cls,
        config: Any,
        source: Source,
        validation: Source,
        *,
        data: str | None,
        folder: Path,
        pretrained: Pretrained | None,
    ) -> Self:
        """The job on these images.

        Args: config: of the job's own type.  data: what --data was.
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
            classes=cls.read_classes(source, validation, config),
            pretrained=pretrained,
            initial=folder / INITIAL_FILE if pretrained else None,
        )

    @classmethod
    def read_classes(cls, source: Source, validation: Source, config: Any) -> Sequence[str]:
        """The names of the classes, after checking the labels.   Raises: DataError."""
        raise NotImplementedError

    @property
    def uniform_loss(self) -> float:
        """The loss of a model that takes all classes for equally likely."""
        return math.log(max(2, self.num_classes))

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
        return replace(self.config.loop, max_loss=self.config.divergence * self.uniform_loss)

    @property
    def ema_decay(self) -> float | None:
        return self.config.ema_decay

    @property
    def best(self) -> tuple[str, Path]:
        return self.best_metric, self.folder / "best"

    @property
    def params(self) -> dict[str, Any]:
        return {**super().params, "classes": self.num_classes}

    @property
    def tags(self) -> dict[str, str]:
        return {**super().tags, **(self.pretrained.tags if self.pretrained else {"pretrained": "none"})}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "classes": list(self.classes)}

    def left_out(self, *, rank: int) -> list[BrokenRecord]:
        return list(self.broken.values())

    def final_metrics(self, state: TrainState) -> dict[str, float]:
        """final/* of the last evaluation, best/* of the best one, each with the job's `figures`; and best/step."""
        best = read_state(self.best[1])
        numbers = {f"final/{name}": state.metrics[f"val/{name}"] for name in self.figures}
        numbers |= {f"best/{name}": best["metrics"][f"val/{name}"] for name in self.figures}
        return {**numbers, "best/step": float(best["position"]["step"])}

    def with_initial(self, model: nn.Module) -> nn.Module:
        """The same model, its encoder with the pretrained weights."""
        if self.initial is not None:
            initial = safetensors.torch.load_file(self.initial)
            model.load_state_dict(model.state_dict() | initial)
        return model
