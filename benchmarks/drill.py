"""What a run does when something breaks: one fault after the other, on real Rays of this machine.

    python benchmarks/drill.py [--faults NAME ...] [--output FOLDER]          (make drill)

Each fault strikes a small pretraining of 60 steps, alone or on a cluster of several nodes (raylets). Afterwards its
images, its weights and its optimiser are compared with those of a run that nothing happened to. Prints a table and
writes it to FOLDER/table.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/drill.py`

from benchmarks.drilling import alone, cluster
from benchmarks.drilling.ground import Ground, LeftOut, Outcome
from mixmae.writing import write_text
from pipelines.command import command

FAULTS: dict[str, Callable[[Ground], Outcome]] = {fault.__name__: fault for fault in (*alone.FAULTS, *cluster.FAULTS)}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The faults, and where the runs go."""

    faults: tuple[str, ...] = tuple(FAULTS)
    """Names of faults; default: all."""
    output: Path = Path("runs/drill")
    """Folder for the runs and the table; deleted before."""


def run(arguments: Arguments) -> int:
    """Strike, compare, print.   Returns: the process's exit status: 1 if a fault was not survived as it should be."""
    unknown = sorted(set(arguments.faults) - set(FAULTS))
    if unknown:
        raise ValueError(f"there is no fault {unknown[0]!r}: choose of {', '.join(FAULTS)}.")
    folder = arguments.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ground = Ground(folder)
    rows = ["| fault | recovered in | images lost | seen twice | weights and optimiser | it said |"]
    rows += ["|---|---:|---:|---:|---|---|"]
    failed = 0
    try:
        for name in arguments.faults:
            try:
                rows.append(row(FAULTS[name](ground), folder))
            except LeftOut as reason:
                rows.append(f"| {name} | | | | left out | {reason} |")
            except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
                failed += 1
                rows.append(f"| {name} | | | | FAILED | {str(error).strip().splitlines()[-1][:300]} |")
                print(error, flush=True)
            print(rows[-1], flush=True)
            write_text(folder / "table.md", "\n".join(rows) + "\n")
    finally:
        cluster.close_clusters()
    return 1 if failed else 0


def row(outcome: Outcome, folder: Path) -> str:
    """A line of the table."""
    seconds = "" if outcome.recovered_s is None else f"{outcome.recovered_s:.0f} s"
    lost, twice = ("" if count is None else str(count) for count in (outcome.lost, outcome.twice))
    said = outcome.said.replace("|", "/").replace(f"{folder}/", "")
    return f"| {outcome.injected} | {seconds} | {lost} | {twice} | {outcome.weights} | {said} |"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="drill.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
