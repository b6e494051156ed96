"""A running average of a model's weights, to evaluate with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mixmae.training.sharding import part_of


class WeightAverage:
    """An exponential moving average of the trainable parameters: average = d * average + (1 - d) * weight.

    At the n-th update (from 1) d = min(decay, n / (n + 9)), so that the first weights, which are not trained, do not
    linger: after n updates about the last tenth of them counts until `decay` takes over.

    Args:
        model: the bare module, not wrapped by DDP; its weights are where the average starts.
        decay: in [0, 1); 0.9999 remembers about ten thousand steps.
    Source: the warm start of TensorFlow's ExponentialMovingAverage (num_updates). Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must be in [0, 1), for example 0.9999")
        self.decay = decay
        self._updates = 0
        self._averages = {name: weight.detach().clone() for name, weight in _weights(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights; call it after each optimiser step."""
        self._updates += 1
        decay = min(self.decay, self._updates / (self._updates + 9))
        weights = _weights(model)
        averages = [self._averages[name] for name in weights]
        torch._foreach_lerp_(averages, list(weights.values()), 1 - decay)  # on a GPU a few launches, not one per weight

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averages while the context is open, and its own weights back at the end."""
        weights = _weights(model)
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            _copy(self._averages, weights)
            yield
        finally:
            _copy(own, weights)

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name and the number of updates."""
        return {"updates": self._updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict.   Raises: ValueError if it is of a model with other parameters."""
        theirs, ours = state["averages"], self._averages
        if {name: value.shape for name, value in theirs.items()} != {name: value.shape for name, value in ours.items()}:
            raise ValueError("the averaged weights are those of another model: continue with the config they came from")
        self._updates = state["updates"]
        _copy(theirs, ours)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def _copy(values: dict[str, Any], into: dict[str, Any]) -> None:
    for name, target in into.items():
        target.copy_(part_of(values[name], target))
