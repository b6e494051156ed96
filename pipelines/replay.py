"""Run a step that was not finite once more, and say where it breaks.

    python pipelines/replay.py OUTPUT/diverged/rank0

A run whose gradients are not finite for several steps in a row, twice at the same place, stops and keeps the last of
them. This repeats its forward and backward pass on the CPU, in float32, with torch's detection of anomalies. Open only
folders of your own runs: they contain a pickle. Exit status: 1 if the step breaks again, else 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mixmae.training.diverged import BATCH_FILE, replay
from pipelines.command import command

_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which step."""

    folder: tyro.conf.Positional[Path]
    """OUTPUT/diverged/rankN of the run that stopped."""


def run(arguments: Arguments) -> int:
    """Repeat the step and print what is not finite.   Returns: the process's exit status."""
    loss, found = replay(arguments.folder)
    batch = torch.load(arguments.folder / BATCH_FILE, weights_only=True)
    rows = batch["rows"].tolist()
    print(f"rows of the batch: {', '.join(map(str, rows[:_NAMED]))}{' ...' if len(rows) > _NAMED else ''}")
    print(f"loss {loss}")
    if not found:
        print(
            "Everything is finite here: the fault is one of another worker (look at the other ranks), of the GPU or of "
            "its arithmetic (--loop.precision), and may not come back."
        )
        return 0
    print("not finite, in this order:")
    for line in found[:_NAMED]:
        print(f"  {line}")
    if len(found) > _NAMED:
        print(f"  and {len(found) - _NAMED} more")
    return 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="replay.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
