"""The record of a run, run.json in its folder: what it is, what it was begun with, and how it ended."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import mixmae
from mixmae.data.shards.plan import DEFAULT_SET, built_in
from mixmae.data.source import Source
from mixmae.data.sources.storage import plain_place
from mixmae.jobs.config import RunConfig
from mixmae.tracking import RunRef, run_of
from mixmae.training.run_folder import PLAN_FILE, RunFolder


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The training set of a run."""

    name: str
    digest: str
    source: str
    """What --data was: a place, local ones as absolute paths, or the name of a built-in set ("moths" without --data).
    Earlier versions wrote "built-in" for what is "shapes" now."""
    window_rows: int
    """Images per shuffle window; decided once: a lost index file must not change the order of a continued run."""

    @classmethod
    def of(cls, source: Source, data: str | None, config: RunConfig) -> DataRecord:
        """The record of a source.   Args: data: what --data was."""
        data = data or DEFAULT_SET
        return cls(
            name=source.name,
            digest=source.digest,
            source=data if built_in(data) else plain_place(data),
            window_rows=config.window_rows_for(source.exact_reads),
        )


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The weights that a run starts from."""

    path: str
    digest: str
    run_id: str | None
    """The MLflow run that they come from, if they name one."""
    key: str | None = None
    """What --weights-key was, where a file has several sets of weights."""

    @property
    def tags(self) -> dict[str, str]:
        """The tags of an MLflow run that starts from them."""
        return {"pretrained": self.path, **({"pretrained.run_id": self.run_id} if self.run_id else {})}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What run.json holds; fields that a run does not have are None or empty, and not in the file."""

    status: Literal["preparing", "running", "finished", "stopped", "failed"]
    """preparing: it has not trained yet, and its folder may be used anew. stopped: training could not go on. failed:
    its workers did, too often. A run that was interrupted, or killed, still says running: see mixmae.lock."""
    recipe: str = ""
    """Name of the recipe, of a sweep that of the space."""
    config: Mapping[str, Any]
    """The config as JSON values (mixmae.jobs.config.to_json)."""
    pretrained: Pretrained | None = None
    classes: Sequence[str] | None = None
    """Names of the classes, of a run that trains a classifier."""
    cached: bool = False
    """Whether it is a linear probe on cached features."""
    space: Mapping[str, Any] | None = None
    """The search space, of a sweep."""
    trial: Mapping[str, Any] | None = None
    """The values of the fields that vary, of a sweep's trial."""
    data: DataRecord | None = None
    mlflow: RunRef | None = None
    checkpoint: str | None = None
    """The last checkpoint, of a finished run; of a sweep and of a cached probe the best weights."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of a finished run: those of its last log and evaluation, and the final ones."""
    reason: str = ""
    """Why it was stopped, or failed."""
    branch: Mapping[str, Any] | None = None
    """Where it went back to last, with --from-step: the `step`, and the `run_id` in MLflow of what it left."""

    @property
    def is_begun(self) -> bool:
        """Whether it may have trained: a run that never did binds nobody."""
        return self.status != "preparing"

    def to_json(self) -> dict[str, Any]:
        """The content of run.json."""
        content: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        content |= {name: asdict(content[name]) for name in ("pretrained", "data", "mlflow") if name in content}
        unused = [name for name in ("cached", "metrics", "reason") if not content[name]]
        return {name: value for name, value in content.items() if name not in unused}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRecord:
        """Read what to_json wrote, now or in an earlier version."""
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in content.items() if name in known and value is not None}
        kinds: dict[str, Any] = {"pretrained": Pretrained, "data": DataRecord, "mlflow": RunRef}
        parts = {name: kind(**values[name]) for name, kind in kinds.items() if name in values}
        return cls(**{**values, **parts})


def read_record(folder: RunFolder) -> RunRecord | None:
    """The record in a folder, or None in a new one.   Raises: as RunFolder.read."""
    content = folder.read()
    if content is None:
        return None
    record = RunRecord.from_json(content)
    # Where MLflow was away at first, its run is younger than the record.
    return replace(record, mlflow=run_of(folder.path) or record.mlflow) if record.is_begun else record


def read_begun(folder: RunFolder) -> RunRecord | None:
    """As read_record, but None also for a run that never trained."""
    record = read_record(folder)
    return record if record is not None and record.is_begun else None


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    return {
        "mixmae": mixmae.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("ray", "numpy", "pyarrow")},
    }


def compared_with_plan(folder: Path, images_per_s: float) -> dict[str, float]:
    """What a run was planned to be and became, as metrics; nothing if there is no plan in its folder.

    Args: images_per_s: of the run.
    """
    try:
        planned = float(json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))["images_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"plan/images_per_s": planned, "plan/reached": images_per_s / planned}
