"""The folder that a training run writes: where its parts are, and what to load from it.

run.json                what the run is, and whether it is finished (mixmae.jobs.record has its fields)
run.lock                whose the folder is (mixmae.lock)
progress.json, restarts.jsonl   how far it is, and how often workers failed (mixmae.training.progress)
checkpoints/step_N/     checkpoints (mixmae.training.checkpoint)
best/                   the weights that did best on the validation set, where a run keeps them
panels/step_N.png       pictures of held-out images
metrics.jsonl           the journal of all that is logged (mixmae.tracking.journal)
metrics.sent, metrics.refused.jsonl   how much of it MLflow has, and what it does not take
evaluations.jsonl       metrics of each evaluation, with the step; a step that was trained again is there again
probe.png               curves of the probe, in pretraining
broken_images.jsonl     the ledger: images that could not be decoded
left_K_at_step_N/       what was put aside when the run went back to step N, with its own journal
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mixmae.lock import LOCK_FILE
from mixmae.training.checkpoint import STATE_FILE, list_checkpoints, read_state, step_of, upgraded
from mixmae.writing import recover, write_json, write_text

RUN_FILE = "run.json"


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def read(self) -> dict[str, Any] | None:
        """run.json with today's names of the config's fields, or None in a new folder.

        Raises: ValueError if the folder is something else's, or the file is damaged.
        """
        file = self.path / RUN_FILE
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{file} is damaged ({error}): put it back from a copy, or choose another --output."
                ) from error
            return content | {"config": upgraded(content.get("config", {}))}
        if self.path.is_dir() and not all(map(_is_passing, self.path.iterdir())):
            raise ValueError(f"{self.path} is not empty and not a run of this program: choose another --output.")
        return None

    def write(self, content: dict[str, Any]) -> None:
        """Replace run.json.   Raises: ValueError if the folder cannot be written."""
        try:
            write_json(self.path / RUN_FILE, content)
        except OSError as error:
            raise ValueError(
                f"The output folder {self.path} cannot be written ({error.strerror}): choose another --output."
            ) from error

    def add_broken(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add images to the ledger, each row once; returns those that are new."""
        known = {entry["row"] for entry in self.broken()}
        new = list({entry["row"]: entry for entry in entries if entry["row"] not in known}.values())
        with self.ledger.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in new)
        return new

    def broken(self) -> list[dict[str, Any]]:
        """The ledger's entries: row, where, reason."""
        return (
            [json.loads(line) for line in self.ledger.read_text(encoding="utf-8").splitlines()]
            if self.ledger.exists()
            else []
        )

    @property
    def ledger(self) -> Path:
        """The list of images that could not be decoded."""
        return self.path / "broken_images.jsonl"

    @property
    def best(self) -> Path:
        """The weights that did best on the validation set."""
        return recover(self.path / "best")

    def add_evaluation(self, metrics: dict[str, float]) -> list[dict[str, float]]:
        """Keep the metrics of an evaluation, with its `step`; returns those of all steps, the last ones of each."""
        file = self.path / "evaluations.jsonl"
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(metrics) + "\n")
        by_step = {entry["step"]: entry for entry in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        return [by_step[step] for step in sorted(by_step)]

    def put_aside(self, step: int) -> Path:
        """Move what belongs to steps after this one, and the journal, to a folder of their own; returns it."""
        number = sum(1 for _ in self.path.glob("left_*"))
        aside = self.path / f"left_{number}_at_step_{step}"
        (aside / "checkpoints").mkdir(parents=True)
        for checkpoint in list_checkpoints(self.path / "checkpoints"):
            if step_of(checkpoint) > step:
                checkpoint.rename(aside / "checkpoints" / checkpoint.name)
        if self.best.is_dir() and read_state(self.best)["position"]["step"] > step:
            self.best.rename(aside / "best")
        for name in ("metrics.jsonl", "metrics.sent", "metrics.refused.jsonl", "progress.json"):
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        # Its journal may have to be sent still, with the pictures that it names; those up to the step stay here, too.
        for picture in [*self.path.glob("*.png"), self.ledger, *self.path.glob("panels/step_*.png")]:
            if picture.exists():
                target = aside / picture.relative_to(self.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(picture, target)
                if picture.parent != self.path and step_of(picture.with_suffix("")) > step:
                    picture.unlink()
        evaluations = self.path / "evaluations.jsonl"
        if evaluations.exists():
            lines = evaluations.read_text(encoding="utf-8").splitlines()
            write_text(evaluations, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        return aside

    @property
    def left(self) -> list[Path]:
        """The folders of what was put aside."""
        return sorted(self.path.glob("left_*_at_step_*"))

    def last_panel(self) -> Path | None:
        """The newest panel's file."""
        return max((self.path / "panels").glob("step_*.png"), default=None)


def _is_passing(file: Path) -> bool:
    """Whether it is what a run leaves that was killed before it wrote its record."""
    is_partial_record = file.name.startswith(".partial.") and file.name.endswith(f".{RUN_FILE}")
    return file.name.startswith(LOCK_FILE) or is_partial_record


def run_around(path: Path) -> Path | None:
    """The folder of the run that a path is, or is in; None if there is none."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / RUN_FILE).is_file()), None)


def weights_of(path: Path) -> Path:
    """What to load when a user names a run's folder: its best weights, else its last checkpoint; other paths stay.

    Raises: ValueError for a run without a checkpoint.
    """
    if not (path / RUN_FILE).is_file():
        return path
    if (recover(path / "best") / STATE_FILE).is_file():
        return path / "best"
    last = next(iter(list_checkpoints(path / "checkpoints")), None)
    if last is None:
        raise ValueError(f"{path} is a run without a checkpoint yet: let it train on, or choose another one.")
    return last
