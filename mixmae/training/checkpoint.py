"""Checkpoints: a folder with model.safetensors, optimizer.pt and state.json, complete or not there at all.

With a running average of the weights also average.pt. state.json has the SHA-256 of every file, and its own.
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

from mixmae.training.checkpoint_files import sha256_of, state_sha256, step_of
from mixmae.training.ema import WeightAverage
from mixmae.training.sharding import cut_state, part_of
from mixmae.writing import flush, writing

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
AVERAGE_FILE = "average.pt"
STATE_FILE = "state.json"
RENAMED_FIELDS = {"loop.panel_every_epochs": "loop.evaluate_every_epochs", "resize_share": "crop_pct"}
"""Fields of a run's config that files of earlier versions have under another name."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


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
    write_parts(Path(directory), parts_of(model, optimizer, average), state)


def parts_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, average: WeightAverage | None
) -> dict[str, dict[str, Any]]:
    """What goes into each file of a checkpoint; tensors are those of the model and the optimiser, not copies, and parts
    where these are sharded."""
    parts: dict[str, dict[str, Any]] = {
        MODEL_FILE: {name: value.detach() for name, value in model.state_dict().items()}
    }
    if optimizer is not None:
        parts[OPTIMIZER_FILE] = optimizer.state_dict()
    if average is not None:
        parts[AVERAGE_FILE] = average.state_dict()
    return parts


def write_parts(directory: Path, parts: Mapping[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Write a checkpoint from what parts_of gave, with the SHA-256 of each file, so that it is there or not at all.

    Raises: OSError.
    """
    with writing(directory) as folder:
        folder.mkdir()
        for name, part in parts.items():
            if name == MODEL_FILE:
                tensors = {key: tensor.cpu().contiguous() for key, tensor in part.items()}
                safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
            else:
                torch.save(part, folder / name)
        files = {name: sha256_of(folder / name) for name in parts}
        content = state | {"files": files}
        text = json.dumps(content | {"state_sha256": state_sha256(content)}, indent=2, sort_keys=True) + "\n"
        (folder / STATE_FILE).write_text(text, encoding="utf-8")
        for name in (*parts, STATE_FILE):
            flush(folder / name)
        flush(folder)
    flush(directory.parent)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder checkpoints/, the newest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def verify(directory: str | os.PathLike[str]) -> None:
    """Compare every file with the digest that was taken when it was written; earlier versions took none.

    Raises: DamagedCheckpoint.
    """
    folder = Path(directory)
    content = _read_json(folder)
    if "files" not in content:
        return
    if content.get("state_sha256") != state_sha256(content):
        raise DamagedCheckpoint(f"{folder / STATE_FILE} is not what was written: use another checkpoint.")
    for name, digest in content["files"].items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder} has no {name}: the checkpoint is incomplete, use another one.")
        if sha256_of(folder / name) != digest:
            raise DamagedCheckpoint(f"{folder / name} is not what was written: use another checkpoint.")


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise DamagedCheckpoint(f"{folder} is not a checkpoint: it has no {STATE_FILE}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}): use an older checkpoint.") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} is damaged (it is no JSON object): use an older checkpoint.")
    return content


def read_state(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint's state.json, with today's names of the config's fields.

    Raises: CheckpointError if the folder is not a checkpoint.
    """
    state = _read_json(Path(directory))
    for name in ("files", "state_sha256"):  # for `verify`
        state.pop(name, None)
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
    loaded: dict[str, Any] = {}
    for name in (name for name, part in wanted.items() if part is not None):
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder} has no {name}: the checkpoint is incomplete, use another one.")
        try:
            if name == MODEL_FILE:
                loaded[name] = safetensors.torch.load_file(folder / name)
            else:
                loaded[name] = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and safetensors raise whatever they like on damaged bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DamagedCheckpoint(f"{folder / name} is damaged ({reason}): use another checkpoint.") from error
    own = model.state_dict()
    difference = _difference(own, loaded[MODEL_FILE])
    if difference:
        raise CheckpointError(
            f"{folder} was made with another model ({difference}): continue it with the config it was made with "
            "(state.json beside it has it), or choose a new --output."
        )
    model.load_state_dict({name: part_of(value, own[name]) for name, value in loaded[MODEL_FILE].items()})
    if optimizer is not None:
        cut_state(optimizer, loaded[OPTIMIZER_FILE])
        optimizer.load_state_dict(loaded[OPTIMIZER_FILE])
    if average is not None:
        average.load_state_dict(loaded[AVERAGE_FILE])
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
