"""What is kept of a step whose gradient was not finite: the weights before it, its batch and its seed."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixmae.training.checkpoint import parts_of, write_parts
from mixmae.training.loop import Batch

BATCH_FILE = "batch.pt"


def write_batch(folder: Path, *, model: nn.Module, batch: Batch, step: int, describe: dict[str, Any]) -> None:
    """Write rank 0's last micro-batch, with the weights, as a checkpoint folder that replay.py reads.

    Args: step: finished steps after it.  describe: of the job.
    """
    assert is_dataclass(batch)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    kept = {name: value.clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    state = describe | {"position": {"step": step - 1}}
    write_parts(folder, {**parts_of(model, None, None), BATCH_FILE: kept}, state)
