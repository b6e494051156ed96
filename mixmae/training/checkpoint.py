"""Checkpoints: a folder with model.safetensors, optimizer.pt and state.json, complete or not there at all.

With a running average of the weights also average.pt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from mixmae.training.ema import WeightAverage
from mixmae.writing import writing

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
AVERAGE_FILE = "average.pt"
STATE_FILE = "state.json"
RENAMED_FIELDS = {"loop.panel_every_epochs": "loop.evaluate_every_epochs", "resize_share": "crop_pct"}
"""Fields of a run's config that files of earlier versions have under another name."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: WeightAverage | None = None,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint folder under a temporary name, then rename it.

    Args:
        directory: the folder to make; one that exists is replaced.
        model: the bare module, not wrapped by DDP or compile.
        optimizer, average: left out of the folder when None.
        state: JSON values: step, config, versions, ...
    """
    with writing(Path(directory)) as folder:
        folder.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
        if optimizer is not None:
            torch.save(optimizer.state_dict(), folder / OPTIMIZER_FILE)
        if average is not None:
            torch.save(average.state_dict(), folder / AVERAGE_FILE)
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_state(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint's state.json, with today's names of the config's fields.

    Raises: CheckpointError if the folder is not a checkpoint.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {STATE_FILE}.")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint.") from error
    return state | ({"config": upgraded(state["config"])} if "config" in state else {})


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as JSON values, from a file of any version: renamed fields have today's names.

    All that read a config from run.json, state.json or an exported file's metadata call it.
    """
    new = {name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    for before, now in RENAMED_FIELDS.items():
        *parents, old = before.split(".")
        place = new
        for parent in parents:
            place = place.get(parent, {})
        if old in place:
            place[now.rpartition(".")[2]] = place.pop(old)
    return new


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a bare model and, if given, its optimiser and the average of its weights.

    Returns: the checkpoint's state.
    Raises: CheckpointError if a file is missing or the tensors are not those of this model.
    """
    folder = Path(directory)
    state = read_state(folder)
    wanted = {MODEL_FILE: model, OPTIMIZER_FILE: optimizer, AVERAGE_FILE: average}
    for name in (name for name, part in wanted.items() if part is not None):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: the checkpoint is incomplete, use another one.")
    tensors = safetensors.torch.load_file(folder / MODEL_FILE)
    difference = _difference(model.state_dict(), tensors)
    if difference:
        raise CheckpointError(
            f"{folder} was made with another model ({difference}): continue it with the config it was made with "
            "(state.json beside it has it), or choose a new --output."
        )
    model.load_state_dict(tensors)
    if optimizer is not None:
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True))
    if average is not None:
        average.load_state_dict(torch.load(folder / AVERAGE_FILE, map_location="cpu", weights_only=True))
    return state


def _difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """What keeps `theirs` from being loaded into `ours`: the first example of each kind, or an empty string."""
    missing = sorted(ours.keys() - theirs.keys())
    unexpected = sorted(theirs.keys() - ours.keys())
    reshaped = [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors missing, first {missing[0]}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected, first {unexpected[0]}")
    if reshaped:
        name = min(reshaped)
        parts.append(f"{name} is {tuple(theirs[name].shape)} there and {tuple(ours[name].shape)} here")
    return "; ".join(parts)
