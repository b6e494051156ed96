"""A search space: the recipe that a sweep starts from, the fields that vary, and how trials are chosen and judged.

A field is named by its dotted path in the recipe's config, as on the command line (optim.layer_decay). Nothing here
knows a recipe: a space is checked against the config that it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tune_spaces.fields import Value, set_fields


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"a choice has the values {self.values}: give each of them once.")

    def draw(self, rng: np.random.Generator) -> Value:
        """One of the values, all equally likely."""
        return self.values[int(rng.integers(len(self.values)))]

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check a config with: all of them."""
        return self.values


@dataclass(frozen=True)
class Uniform:
    """A number in [low, high], evenly distributed itself or, for log, in its logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"a range goes from {self.low} to {self.high}: low must be below high"
                f"{', and above 0 on a log scale' if self.log else ''}."
            )

    def draw(self, rng: np.random.Generator) -> float:
        """A number of the range."""
        if self.log:
            return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check a config with: if it takes both ends, it takes what lies between."""
        return (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving: a trial stops early if it is not among the best at the same epoch."""

    grace_epochs: float = 1.0
    """Epochs that every trial gets."""
    reduction: float = 3.0
    """At each rung one trial in this many continues; the rungs are at epochs grace_epochs x reduction^n."""

    def __post_init__(self) -> None:
        if not self.grace_epochs > 0 or not self.reduction > 1:
            raise ValueError(f"{self}: grace_epochs must be above 0 and reduction above 1.")


Metric = Literal[
    "val/top1", "val/top5", "val/miou", "val/box_ap", "val/mask_ap", "val/loss", "probe/knn_top1", "probe/linear_top1"
]


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep tries."""

    about: str
    """What the space is for and where its values come from; the first line is its entry in the list."""
    recipe: str
    """Name of the recipe, of finetuning or of pretraining, that all trials start from."""
    vary: Mapping[str, Choice | Uniform]
    """The fields that vary, by dotted name."""
    change: Mapping[str, Value] = field(default_factory=dict)
    """Fields whose value in all trials is not the recipe's; the command line can change them again."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination. random: drawn with the recipe's seed. optuna: drawn by Optuna, which learns from the
    results so far."""
    trials: int | None = None
    """How many are drawn; None for a grid, whose size follows from its values."""
    hours: float | None = None
    """A sweep stops after so many hours; None: when all trials have ended."""
    without: tuple[Mapping[str, Value], ...] = ()
    """What a grid leaves out: every combination that has all the values of one of these."""
    metric: Metric = "val/top1"
    """What trials are ranked by, taken at the end of each. Finetuning has val/*, segmentation val/miou and val/loss,
    detection val/box_ap and val/mask_ap, pretraining probe/*."""
    scheduler: Asha | None = None
    """Which trials stop early; None: no trial does."""
    reference: Mapping[str, Value] = field(default_factory=lambda: {"optim.layer_decay": None})
    """Fields of the reference: a finetuning from scratch that the trials, which start from pretrained weights, are
    compared with. All other fields, those that vary too, have the recipe's values. Layer decay protects pretrained
    layers, so it is off. Where training from scratch needs another rate, give it here: {"optim.base_lr": 0.03}."""

    def __post_init__(self) -> None:
        if not self.vary or any(
            isinstance(dimension, Choice) and not dimension.values for dimension in self.vary.values()
        ):
            raise ValueError("the space has no trial: give at least one field to vary, and each at least one value.")
        if self.search == "grid":
            if drawn := [name for name, dimension in self.vary.items() if isinstance(dimension, Uniform)]:
                raise ValueError(f"a grid cannot hold the range of {drawn[0]}: give it a Choice, or draw at random.")
            if self.trials is not None:
                raise ValueError(
                    f"a grid has its own {self.num_trials} trials, not {self.trials}: leave the number out, or take a "
                    "space whose trials are drawn."
                )
            if not self.points(0):
                raise ValueError("the space has no trial: all combinations are left out.")
        elif self.trials is None or self.trials < 1:
            raise ValueError(f"the space has no trial: say how many to draw, not {self.trials}.")
        elif self.without:
            raise ValueError("only a grid can leave combinations out.")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"the budget is {self.hours} hours: it must be above 0.")
        for name in self.vary:
            if (name.startswith("encoder.") and name != "encoder.drop_path") or name.startswith("augment.image_size"):
                raise ValueError(
                    f"{name} changes the shapes of the weights, which the trials share: run one sweep for each value, "
                    "with the flag of that name."
                )

    @property
    def pretrains(self) -> bool:
        """Whether the trials pretrain, from nothing, and are judged by a probe; otherwise they finetune."""
        return self.metric.startswith("probe/")

    @property
    def registers(self) -> bool:
        """Whether its best model can be a registered one; a detector's output has no fixed shape."""
        return not self.pretrains and not self.metric.startswith(("val/box_", "val/mask_"))

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether the best trial has the largest or the smallest value of the metric."""
        return "min" if self.metric == "val/loss" else "max"

    @property
    def final_metric(self) -> str:
        """The metric's name among those of a finished trial: final/top1 for val/top1."""
        return final_name(self.metric)

    @property
    def num_trials(self) -> int:
        """How many trials a sweep has."""
        return len(self.points(0)) if self.search == "grid" else self.trials or 0

    def points(self, seed: int) -> list[dict[str, Value]]:
        """The values of every trial.

        Args: seed: of random draws.
        Returns: for each trial the values by dotted name, the same ones at every call. For optuna, which chooses its
            own values, a random sample that shows what it could choose.
        """
        if self.search == "grid":
            columns = [dimension.values for dimension in self.vary.values() if isinstance(dimension, Choice)]
            points = [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*columns)]
            return [point for point in points if not any(some.items() <= point.items() for some in self.without)]
        rng = np.random.default_rng(seed)
        return [{name: dimension.draw(rng) for name, dimension in self.vary.items()} for _ in range(self.num_trials)]

    def check(self, config: Any) -> None:
        """Check that a config has every field and takes every value.   Raises: ValueError if not."""
        set_fields(config, self.change)
        if not self.pretrains:
            set_fields(config, self.reference)
        if self.search == "grid":
            for point in self.points(0):
                set_fields(config, point)
            return
        for name, dimension in self.vary.items():
            for value in dimension.ends:
                set_fields(config, {name: value})

    def to_json(self) -> dict[str, Any]:
        """What must be the same when a sweep is continued, as JSON values."""
        vary = {
            name: list(dimension.values)
            if isinstance(dimension, Choice)
            else {"low": dimension.low, "high": dimension.high, "log": dimension.log}
            for name, dimension in self.vary.items()
        }
        scheduler = None if self.scheduler is None else vars(self.scheduler)
        return {"recipe": self.recipe, "vary": vary, "search": self.search, "trials": self.num_trials} | {
            "metric": self.metric,
            "scheduler": scheduler,
            "without": [dict(some) for some in self.without],
        }


def final_name(metric: str) -> str:
    """Name of a curve's last value among the metrics of a finished run: final/top1 for val/top1."""
    return f"final/{metric.partition('/')[2]}"
