"""Checkpoints while training goes on: copied in memory, then written by a thread."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmae.training.checkpoint import list_checkpoints, parts_of, write_parts
from mixmae.training.ema import WeightAverage
from mixmae.training.sharding import whole


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, and keeps the newest.

    The weights are those of the moment of `save`: they are copied into memory that is kept from one checkpoint to the
    next, and training waits for this copy alone. A checkpoint appears under its name when its files are on the disk;
    only then older ones go. What cannot be written is reported; training goes on, and the next one is tried.

    Args:
        folder: where step_N folders are made.
        keep: newest checkpoints that stay; None: all.
        may_write: asked before each checkpoint: False where the run has lost its folder to another process.
        report: gets one line for each checkpoint that could not be written, in a thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None,
        may_write: Callable[[], bool] = lambda: True,
        report: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._keep, self._may_write, self._report = folder, keep, may_write, report
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._reserving: Future[Any] | None = None

    def save(
        self,
        *,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        average: WeightAverage | None,
        state: dict[str, Any],
    ) -> float:
        """Copy everything and begin to write it as step_N; waits for the checkpoint before this one. Where the model is
        sharded, all other workers call `give_parts`.

        Args: state: JSON values that nobody changes any more.
        Returns: seconds for which training stood still.
        """
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # it was reported
            self.wait()
        if self._reserving is not None:
            self._reserving.result()
        parts = _mapped(self._copy, parts_of(model, optimizer, average))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are made without waiting for each
        self._writing = self._thread.submit(self._write, step, parts, state)
        return time.perf_counter() - start

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written; returns its folder, or None if there was none.

        Raises: what went wrong with it.
        """
        return None if self._writing is None else self._writing.result()

    def _write(self, step: int, parts: Mapping[str, dict[str, Any]], state: dict[str, Any]) -> Path:
        target = self._folder / f"step_{step:07d}"
        try:
            if not self._may_write():
                raise OSError(f"another process has taken over {self._folder.parent}")
            write_parts(target, parts, state)
        except Exception as error:
            self._report(f"the checkpoint of step {step} could not be written ({error}); training goes on")
            raise
        self._remove_older()
        return target

    def _remove_older(self) -> None:
        for old in list_checkpoints(self._folder)[self._keep or None :] if self._keep else ():
            aside = old.with_name(f".partial.{old.name}")  # half of it must not look like a checkpoint
            with contextlib.suppress(OSError):
                old.replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _copy(self, value: Tensor, name: str) -> Tensor:
        """A copy of a whole tensor in this process's memory."""
        return self._place(value, name).copy_(whole(value.detach()), non_blocking=True)

    def _place(self, value: Tensor, name: str) -> Tensor:
        """The memory for it."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            pinned = value.device.type == "cuda"
            copy = self._copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return copy

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> None:
        """Take the memory for the copies beforehand, in the thread: the first copy would wait for every new page.

        Args: as `save`; the optimiser has made a step.
        """
        # Not in the thread: while a step gathers weights, its model must not be asked for them.
        parts = parts_of(model, optimizer, average)
        self._reserving = self._thread.submit(_mapped, lambda value, name: self._place(value, name).zero_(), parts)


def give_parts(model: nn.Module, optimizer: torch.optim.Optimizer | None, average: WeightAverage | None) -> None:
    """Send what this worker has of a sharded model to the one that saves it at the same time."""

    def give(value: Tensor, name: str) -> Tensor:
        whole(value.detach())
        return value

    _mapped(give, parts_of(model, optimizer, average))


def _mapped(change: Callable[[Tensor, str], Tensor], value: Any, name: str = "") -> Any:
    """Nested dicts and lists with all tensors changed.   Args: change: is given a tensor and its path."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, dict):
        return {key: _mapped(change, item, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, item, f"{name}/{index}") for index, item in enumerate(value))
    return value
