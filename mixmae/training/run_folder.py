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
broken_images.jsonl     the ledger: images that could not be used
plan.json               what the run was planned to cost, if that was asked for before (mixmae.jobs.estimate)
left_K_at_step_N/       what was put aside when the run went back to step N, with its own journal
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mixmae.lock import LOCK_FILE
from mixmae.stores import store_uri, without_secrets
from mixmae.training.checkpoint import MODEL_FILE, STATE_FILE, list_checkpoints, read_state, step_of, upgraded
from mixmae.training.run_store import RunStore
from mixmae.writing import recover, write_json, write_text

RUN_FILE = "run.json"
PLAN_FILE = "plan.json"


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: Path, staging: Path | None = None) -> None:
        """Args: path: a local folder, or the URI of one in a store.  staging: as RunStore.of takes it."""
        self.store = RunStore.of(path, staging)
        """Where the folder is, if it is not local; `path` is where the run works then."""
        self.path = self.store.local if self.store else path.resolve()
        self._is_here = self.store is None

    def bring(self) -> None:
        """Have what the driver needs of a folder in a store, whose lock it has, here.   Raises: StoreError."""
        if self.store is not None and not self._is_here:
            self.store.bring("driver")
            self._is_here = True

    def shown(self, path: Path | None = None) -> str:
        """The folder, or something in it, as a user finds it."""
        path = path or self.path
        if self.store is None or not path.is_relative_to(self.path):
            return str(path)
        return "/".join([self.store.shown, *path.relative_to(self.path).parts])

    def read(self) -> dict[str, Any] | None:
        """run.json with today's names of the config's fields, or None in a new folder.

        Raises: ValueError if the folder is something else's, or the file is damaged; StoreError.
        """
        file = self.path / RUN_FILE
        if self._is_here:
            text = file.read_bytes() if file.is_file() else None
        else:
            assert self.store is not None
            text = self.store.read(RUN_FILE)
        if text is not None:
            try:
                content = json.loads(text)
            except ValueError as error:
                raise ValueError(
                    f"{self.shown(file)} is damaged ({error}): put it back from a copy, or choose another --output."
                ) from error
            return content | {"config": upgraded(content.get("config", {}))}
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        if self.store is not None:
            names = [name for name in self.store.sizes() if not name.startswith(".mark.")]
        if not all(name == PLAN_FILE or _is_passing(name) for name in names):
            raise ValueError(f"{self.shown()} is not empty and not a run of this program: choose another --output.")
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
        """The list of images that could not be used."""
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

    def checkpoints(self) -> list[Path]:
        """The checkpoints, the newest first; of a folder in a store, where `checkpoint` brings them."""
        if self.store is None:
            return list_checkpoints(self.path / "checkpoints")
        return [self.path / "checkpoints" / name for name in self.store.checkpoints()]

    def checkpoint(self, step: int) -> Path:
        """One that there is.   Raises: DamagedCopy, if it comes from a store and is not what was written."""
        path = next(path for path in self.checkpoints() if step_of(path) == step)
        if not path.exists():
            assert self.store is not None
            self.store.get_folder(f"checkpoints/{path.name}", path)
        return path

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
        if self.store is not None:
            self.store.put_aside(aside, step)
        return aside

    @property
    def left(self) -> list[Path]:
        """The folders of what was put aside."""
        return sorted(self.path.glob("left_*_at_step_*"))

    def last_panel(self) -> Path | None:
        """The newest panel's file."""
        return max((self.path / "panels").glob("step_*.png"), default=None)


def _is_passing(name: str) -> bool:
    """Whether it is what a run leaves that was killed before it wrote its record."""
    is_partial_record = name.startswith(".partial.") and name.endswith(f".{RUN_FILE}")
    return name.startswith(LOCK_FILE) or is_partial_record


def run_around(path: Path) -> Path | None:
    """The folder of the run that a path is, or is in; None if there is none, or it is in a store."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / RUN_FILE).is_file()), None)


def weights_of(path: Path) -> Path:
    """What to load when a user names a run's folder: its best weights, else its last checkpoint; other paths stay.

    What is in a store is copied to this user's cache, once.
    Raises: ValueError for a run without a checkpoint; FileNotFoundError, StoreError for a place in a store.
    """
    store = RunStore.of(path)
    if store is not None:
        return store.weights()
    if not (path / RUN_FILE).is_file():
        return path
    if (recover(path / "best") / STATE_FILE).is_file():
        return path / "best"
    last = next(iter(list_checkpoints(path / "checkpoints")), None)
    if last is None:
        raise ValueError(f"{path} is a run without a checkpoint yet: let it train on, or choose another one.")
    return last


def checkpoint_of(path: Path) -> Path:
    """The checkpoint's folder when a user names a run's folder, a checkpoint's, or the file of weights in one.

    Raises: as weights_of.
    """
    folder = weights_of(path.expanduser())
    return folder.parent if folder.name == MODEL_FILE else folder


def stem_of(path: Path) -> str:
    """A short name for a file or folder that a user has named, also of one in a store."""
    uri = store_uri(path)
    return Path(without_secrets(uri)).stem if uri else path.resolve().stem
