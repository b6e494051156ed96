"""A search space: the recipe that a sweep starts from, the fields that vary, and how trials are chosen and judged.

A field is named by its dotted path in the recipe's config, as on the command line (optim.layer_decay). Nothing here
knows a recipe: a space is checked against a config that is handed in.
"""

from __future__ import annotations

import difflib
import itertools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

Value = float | int | str | bool | None
ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"a choice has the values {self.values}: each may be there once.")

    def draw(self, rng: np.random.Generator) -> Value:
        return self.values[int(rng.integers(len(self.values)))]

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that show whether a config takes all of them."""
        return self.values


@dataclass(frozen=True)
class Uniform:
    """A number between two others, or one whose logarithm is evenly spread between theirs."""

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
        if self.log:
            return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that show whether a config takes all of them."""
        return (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Successive halving: a trial stops early when it is not among the best at the same epoch."""

    grace_epochs: float = 1.0
    """Epochs that every trial gets."""
    reduction: float = 3.0
    """One in this many goes on from each rung; the rungs are grace_epochs x reduction^n."""

    def __post_init__(self) -> None:
        if not self.grace_epochs > 0 or not self.reduction > 1:
            raise ValueError(f"{self}: grace_epochs must be above 0 and reduction above 1.")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep tries."""

    about: str
    """What it is for and where its values come from; the first line is its entry in the list."""
    recipe: str
    """Name of the recipe, of finetuning or of pretraining, that all trials start from."""
    vary: Mapping[str, Choice | Uniform]
    """The fields that vary, by dotted name."""
    change: Mapping[str, Value] = field(default_factory=dict)
    """Fields of the recipe that have another value in all trials; the command line may change them again."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination; random: draws from the seed of the recipe; optuna: draws that learn from the results."""
    trials: int | None = None
    """How many are drawn; None for a grid, which says it itself."""
    hours: float | None = None
    """After these a sweep stops; None: when all trials are through."""
    without: tuple[Mapping[str, Value], ...] = ()
    """Combinations that a grid leaves out: those that have all the values of one of these."""
    metric: Literal["val/top1", "val/top5", "val/loss", "probe/knn_top1", "probe/linear_top1"] = "val/top1"
    """What trials are ranked by: its value at the end of each. Pretraining has a probe, finetuning a validation set."""
    scheduler: Asha | None = None
    """Who may stop early; None: nobody."""

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
                    "space that draws."
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
                    f"{name} changes the shapes of the weights, which the trials share: make a sweep of its own for "
                    "each value, with the flag of that name."
                )

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more of the metric is better."""
        return "min" if self.metric == "val/loss" else "max"

    @property
    def final_metric(self) -> str:
        """The metric's name among those of a finished trial: final/top1 for val/top1."""
        return final_name(self.metric)

    @property
    def num_trials(self) -> int:
        """How many trials there are, or are drawn."""
        return len(self.points(0)) if self.search == "grid" else self.trials or 0

    def points(self, seed: int) -> list[dict[str, Value]]:
        """The values of every trial, alike whenever asked; for optuna, which chooses its own, draws at random."""
        if self.search == "grid":
            columns = [dimension.values for dimension in self.vary.values() if isinstance(dimension, Choice)]
            points = [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*columns)]
            return [point for point in points if not any(some.items() <= point.items() for some in self.without)]
        rng = np.random.default_rng(seed)
        return [{name: dimension.draw(rng) for name, dimension in self.vary.items()} for _ in range(self.num_trials)]

    def check(self, config: Any) -> None:
        """See that a config has every field and takes every value.   Raises: ValueError."""
        set_fields(config, self.change)
        if self.search == "grid":
            for point in self.points(0):
                set_fields(config, point)
            return
        for name, dimension in self.vary.items():
            for value in dimension.ends:
                set_fields(config, {name: value})

    def to_json(self) -> dict[str, Any]:
        """What a sweep that is continued must have alike, as JSON values."""
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
    """The name that a metric of the curves, such as val/top1, has among the numbers of a finished run: final/top1."""
    return f"final/{metric.partition('/')[2]}"


def get_field(config: Any, name: str) -> Any:
    """The value of a dotted field.   Raises: ValueError that offers the nearest names."""
    value = config
    for part in name.split("."):
        if not is_dataclass(value) or part not in {item.name for item in fields(value)}:
            near = difflib.get_close_matches(name, field_names(config), n=3, cutoff=0.4)
            remedy = f"did you mean {', '.join(near)}?" if near else "--help of its pipeline lists them."
            raise ValueError(f"{type(config).__name__} has no field {name}: {remedy}")
        value = getattr(value, part)
    return value


def field_names(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields that hold values."""
    names = []
    for item in fields(config):
        value = getattr(config, item.name)
        names += field_names(value, f"{prefix}{item.name}.") if is_dataclass(value) else [f"{prefix}{item.name}"]
    return names


def set_fields(config: ConfigT, values: Mapping[str, Value]) -> ConfigT:
    """A config with other values in dotted fields.

    Raises: ValueError for a field that is not there, a value of another type, or one that the config refuses.
    """
    for name in values:
        get_field(config, name)
    return _set(config, values, "")


def _set(config: Any, values: Mapping[str, Value], prefix: str) -> Any:
    """All fields at once: one value may be allowed only beside another."""
    hints = typing.get_type_hints(type(config))
    own = {name: value for name, value in values.items() if "." not in name}
    for name, value in own.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{prefix}{name} is {value!r}: it must be {_words(hints[name])}.")
    parts: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        if name not in own:
            first, _, rest = name.partition(".")
            parts.setdefault(first, {})[rest] = value
    inner = {first: _set(getattr(config, first), part, f"{prefix}{first}.") for first, part in parts.items()}
    try:
        return replace(config, **own, **inner)
    except ValueError as error:
        if not own:
            raise
        words = " and ".join(f"{prefix}{name} cannot be {value!r}" for name, value in own.items())
        raise ValueError(f"{words}: {error}") from error


def _fits(value: Value, wanted: Any) -> bool:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return value in typing.get_args(wanted)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(wanted, type) and isinstance(value, wanted)


def _words(wanted: Any) -> str:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return " or ".join(map(repr, typing.get_args(wanted)))
    return {float: "a number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}.get(
        wanted, f"a {wanted} (which a sweep cannot vary)"
    )
