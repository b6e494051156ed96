"""What the pipelines that train have in common: the command line, the output folder, MLflow, the way to the workers.

A pipeline begins a run, settles its data, claims the cluster, tracks and trains; between these it says what is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import nn

import mixmae
from mixmae.data.prepare import open_for_training
from mixmae.data.source import Source
from mixmae.data.sources.storage import plain_place
from mixmae.encoders.build import build_encoder
from mixmae.flops import count_macs, count_parameters
from mixmae.jobs.config import RunConfig, differences, to_json
from mixmae.tracking import RunRef, create_run, finish_run, log_file, reopen_run, resolve_uri
from mixmae.training.loop import TrainingStopped, TrainState
from mixmae.training.schedule import RunLength, run_length
from mixmae.training.worker import (
    Message,
    TrainingJob,
    WorkersFailed,
    choose_device,
    connect,
    fit,
    require_resources,
)
from pipelines.console import ProgressView, fail
from pipelines.recipes import find_recipe, list_recipes


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The command line of a run: where to read, where to write, on what to run."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    data: str | None = None
    """Parquet shards, tars, a glob, a file list or a URI such as s3://BUCKET/PREFIX (docs/data.md), or a folder of
    image files, which is prepared once into shards beside the output. Without it: the built-in set of shapes."""
    output: Path | None = None
    """Folder of the run: checkpoints, panels, ledger of broken images. Default: runs/RECIPE[-DATA]. On a cluster it
    must be one that all nodes share."""
    workers: int = 1
    """Training processes: one a GPU, or some on CPU."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where workers train; auto takes GPUs if the cluster has any."""
    resume: bool = False
    """Insist on continuing: fail if the output holds no interrupted run. (It is continued anyway if it does.)"""
    mlflow_uri: str | None = None
    """Tracking server, such as http://HOST:5000. Default: MLFLOW_TRACKING_URI, else mlflow.db beside the output."""
    experiment: str
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the output folder's name."""
    ray_address: str | None = None
    """Ray cluster. Default: RAY_ADDRESS (set by `ray job submit`), else one on this machine for this run."""
    max_failures: int = 3
    """Restarts from the last checkpoint, after a worker died, before giving up."""
    checkpoints_to_keep: int = 3
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}: it must be at least 1.")
        if self.output is not None and re.match(r"[a-z0-9]+:/", str(self.output)):
            raise ValueError(f"--output is {self.output}: runs are written to a folder, on a cluster to a shared one.")


class RunFolder:
    """The output folder of one run: run.json says what it is and whether it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._file = self.path / "run.json"

    def read(self) -> dict[str, Any] | None:
        """run.json, or None in a new folder.   Raises: ValueError if the folder is something else's."""
        if self._file.is_file():
            try:
                return json.loads(self._file.read_text())
            except ValueError as error:
                raise ValueError(
                    f"{self._file} is damaged ({error}): put it back from a copy, or choose another --output."
                ) from error
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and not a run of this program: choose another --output.")
        return None

    def begun(self) -> dict[str, Any] | None:
        """run.json of a run that began to train, or None: a run that never did binds nobody.   Raises: as read."""
        content = self.read()
        return None if content is None or content["status"] == "preparing" else content

    def write(self, content: dict[str, Any]) -> None:
        """Replace run.json.   Raises: ValueError if the folder cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(".json.partial")
            partial.write_text(json.dumps(content, indent=2) + "\n")
            partial.replace(self._file)
        except OSError as error:
            raise ValueError(
                f"The output folder {self.path} cannot be written ({error.strerror}): choose another --output."
            ) from error

    def add_broken(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add images to the ledger, each row once; returns those that are new."""
        known = {entry["row"] for entry in self.broken()}
        new = list({entry["row"]: entry for entry in entries if entry["row"] not in known}.values())
        with self.ledger.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in new)
        return new

    def broken(self) -> list[dict[str, Any]]:
        """The ledger's entries: row, where, reason."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()] if self.ledger.exists() else []

    @property
    def ledger(self) -> Path:
        return self.path / "broken_images.jsonl"

    @property
    def best(self) -> Path:
        """The weights that did best on the validation set, where a run keeps them."""
        return self.path / "best"

    def keep_panel(self, step: int, png: bytes) -> None:
        (self.path / "panels").mkdir(exist_ok=True)
        (self.path / "panels" / f"step_{step:07d}.png").write_bytes(png)

    def last_panel(self) -> Path | None:
        return max((self.path / "panels").glob("step_*.png"), default=None)


def run_folder(arguments: RunArguments, recipe: str) -> RunFolder:
    """The output folder that was asked for, or the default one."""
    data_name = f"-{Path(plain_place(arguments.data)).name}" if arguments.data else ""
    return RunFolder(arguments.output or Path("runs") / f"{recipe}{data_name}")


def run_around(path: Path) -> Path | None:
    """The folder of the run that a path is, or is in; None if there is none."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / "run.json").is_file()), None)


def weights_of(path: Path) -> Path:
    """What to load when a user names a run's folder: its best weights, else its last checkpoint; other paths stay.

    Raises: ValueError for a run without a checkpoint.
    """
    if not (path / "run.json").is_file():
        return path
    if (path / "best" / "state.json").is_file():
        return path / "best"
    last = max(path.glob("checkpoints/step_*"), default=None)
    if last is None:
        raise ValueError(f"{path} is a run without a checkpoint yet: let it train on, or choose another one.")
    return last


@dataclass(kw_only=True)
class Run:
    """A run between its command line and its end. Make it with `begin`, then call the methods in their order."""

    arguments: RunArguments
    recipe: str
    folder: RunFolder
    before: dict[str, Any] | None
    """run.json of the interrupted run that is continued, or None for a new one."""
    content: dict[str, Any]
    """run.json of this one."""
    uri: str
    """MLflow's store."""
    use_gpu: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint says beside config and position: data, versions."""

    def settle_data(self, source: Source) -> None:
        """Note the training set, and refuse to continue on another one.   Raises: ValueError."""
        config, data = self.arguments.config, self.arguments.data
        self.content["data"] = {
            "name": source.name,
            "digest": source.digest,
            "source": plain_place(data) if data else "built-in",
            # Decided once a run: a lost index file must not change the order of a run that is continued.
            "window_rows": config.window_rows_for(source.exact_reads),
        }
        refuse_changes(self.before, self.content, self.folder.path)
        if self.before is not None and "data" in self.before:
            self.content["data"] = self.before["data"]
        self.facts |= {"data": self.content["data"], "versions": versions()}

    def claim_cluster(self) -> None:
        """Join or start Ray and see that it can hold the workers.   Raises: ClusterError."""
        arguments = self.arguments
        connect(arguments.ray_address, num_workers=arguments.workers)
        self.use_gpu = choose_device(arguments.device)
        is_own = not (arguments.ray_address or os.environ.get("RAY_ADDRESS"))
        require_resources(num_workers=arguments.workers, use_gpu=self.use_gpu, is_own=is_own)
        if self.use_gpu and arguments.config.loop.precision == "float32":
            print("note: float32 on a GPU; --loop.precision bfloat16 is about twice as fast")

    def track(
        self,
        length: RunLength,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
    ) -> RunRef:
        """The MLflow run to log to: the interrupted run's own, or a new one with all that is known before training."""
        ref = self.reopen()
        if ref is None:
            ref = create_run(
                uri=self.uri,
                experiment=self.arguments.experiment,
                name=self.arguments.run_name or self.folder.path.name,
                params={**self._params(length), **(params or {})},
                tags={
                    **(tags or {}),
                    "output": str(self.folder.path),
                    **{f"version.{name}": number for name, number in versions().items()},
                },
                dataset=self.content["data"],
                parent_run_id=parent_run_id,
            )
        self.content |= {"status": "running", "mlflow": vars(ref)}
        self.folder.write(self.content)
        return ref

    def train(
        self,
        job: TrainingJob,
        ref: RunRef,
        final_metrics: Callable[[TrainState], Mapping[str, float]] = lambda _: {},
        callbacks: Sequence[Any] = (),
    ) -> tuple[TrainState, str] | None:
        """Train to the end and close the books.

        Args:
            final_metrics: what MLflow shows of a finished run in one number each.
            callbacks: of Ray Train.
        Returns: the final state and its checkpoint, or None after Ctrl-C.
        Raises: TrainingStopped, WorkersFailed.
        """
        arguments, folder = self.arguments, self.folder
        status, tags, metrics = "FAILED", {}, {}
        try:
            with ProgressView(job.length.total_steps) as view:
                state, checkpoint = fit(
                    job,
                    folder=folder.path,
                    name="checkpoints",
                    num_workers=arguments.workers,
                    use_gpu=self.use_gpu,
                    max_failures=arguments.max_failures,
                    checkpoints_to_keep=arguments.checkpoints_to_keep,
                    on_message=lambda message: receive(message, folder, view),
                    callbacks=callbacks,
                )
            status, tags, metrics = "FINISHED", {"checkpoint": checkpoint}, dict(final_metrics(state))
        except KeyboardInterrupt:
            status = "KILLED"
            print("\nInterrupted. The same command continues from the last checkpoint.", flush=True)
            return None
        finally:
            with contextlib.suppress(Exception):  # the store's trouble must not hide the run's
                if folder.broken():
                    log_file(ref, folder.ledger)
                finish_run(ref, status=status, tags=tags, metrics=metrics)
        folder.write(
            self.content | {"status": "finished", "checkpoint": checkpoint, "metrics": {**state.metrics, **metrics}}
        )
        return state, checkpoint

    def describe(self, source: Source, length: RunLength) -> str:
        """How many steps on what, where to."""
        arguments = self.arguments
        return (
            f"{self.recipe} on {source.name} "
            f"({source.num_rows} images): {length.total_steps} steps of {arguments.config.loop.batch_size} images, "
            f"{arguments.workers} {'GPU' if self.use_gpu else 'CPU'} worker{'s' * (arguments.workers > 1)}\n"
            f"output {self.folder.path}\nMLflow {self.content['mlflow']['uri']}"
        )

    @property
    def is_continued(self) -> bool:
        """Whether steps of it may have been trained before."""
        return self.before is not None and "mlflow" in self.before

    def say_broken(self) -> None:
        """Tell how many images could not be decoded, if any."""
        if broken := self.folder.broken():
            print(f"{len(broken)} images could not be decoded and were replaced by others: {self.folder.ledger}")

    def reopen(self) -> RunRef | None:
        """The MLflow run of the interrupted run, set running again; None if there is none."""
        if self.before is None or "mlflow" not in self.before:
            return None
        ref = RunRef(**self.before["mlflow"])
        if self.arguments.mlflow_uri in (None, ref.uri) and reopen_run(ref):
            return ref
        print(f"note: the interrupted run {ref.run_id} is not in {self.uri}; its curves go on in a new one")
        return None

    def _params(self, length: RunLength) -> dict[str, Any]:
        """All fields, and the numbers that runs of any task are compared by, under the same names."""
        config = self.arguments.config
        encoder_config = config.sized_encoder()
        size = config.augment.image_size
        with torch.device("meta"):
            encoder = build_encoder(encoder_config)
        assert isinstance(encoder, nn.Module)
        return {
            **to_json(config),
            "recipe": self.recipe,
            "lr": config.optim.peak_lr(config.loop.batch_size),
            "weight_decay": config.optim.weight_decay,
            "layer_decay": 1.0 if config.optim.layer_decay is None else config.optim.layer_decay,
            "drop_path": encoder_config.drop_path,
            "epochs": config.loop.epochs,
            "steps": length.total_steps,
            "batch_size": config.loop.batch_size,
            "image_size": size if isinstance(size, int) else size[0],
            "seed": config.loop.seed,
            "data.window_rows": self.content["data"]["window_rows"],
            "workers": self.arguments.workers,
            "gpu": int(self.use_gpu),
            "params_m": round(count_parameters(encoder) / 1e6, 3),
            "gmacs": round(count_macs(encoder, size, in_channels=encoder_config.in_channels).total / 1e9, 3),
        }


def begin(arguments: RunArguments, recipe: str, extra: Mapping[str, Any] | None = None) -> Run | None:
    """Claim the output folder for a run, new or continued.

    Args: extra: what run.json keeps beside the config, and what a continued run must have alike.
    Returns: the run, or None if it is finished, which is said.
    Raises: ValueError if the folder holds another run, or none to resume.
    """
    folder = run_folder(arguments, recipe)
    before = folder.begun()
    if before is None and arguments.resume:
        raise ValueError(f"{folder.path} holds no run to resume: correct --output, or leave --resume out to start one.")
    content = {"status": "preparing", "recipe": recipe, "config": to_json(arguments.config), **(extra or {})}
    refuse_changes(before, content, folder.path)
    if before is not None and before["status"] == "finished":
        print(f"This run is finished: {before['checkpoint']}\nTo train again choose another --output.")
        return None
    uri = resolve_uri(arguments.mlflow_uri, folder.path.parent)
    if before is None:
        folder.write(content)
    return Run(arguments=arguments, recipe=recipe, folder=folder, before=before, content=content, uri=uri)


def refuse_changes(before: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a run that was begun before would be continued as another one, as far as is known now."""
    if before is None:
        return
    changed = differences(before["config"], now["config"])
    if "data" in before and "data" in now and before["data"]["digest"] != now["data"]["digest"]:
        changed.append(f"data was {before['data']['name']} ({before['data']['digest']}) and is {now['data']['name']}")
    if (before.get("pretrained") or {}).get("digest") != (now.get("pretrained") or {}).get("digest"):
        was, is_now = ((content.get("pretrained") or {}).get("path", "none") for content in (before, now))
        changed.append(f"pretrained was {was} and is {is_now if was != is_now else 'another file there'}")
    if "classes" in before and "classes" in now and before["classes"] != now["classes"]:
        changed.append(f"the head has {len(before['classes'])} classes and the data {len(now['classes'])} or others")
    if before.get("space") != now.get("space"):
        changed.append(
            "the search space is another one"
            if before.get("space") and now.get("space")
            else "only one of the two is a sweep"
        )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{path} holds a run begun with other settings ({'; '.join(changed[:3])}{more}): continue it with the "
            "ones it was begun with, or choose another --output."
        )


def open_data(data: str | None, folder: Path, holdout_rows: int) -> tuple[Source, Source]:
    """The training and the held-out source; image folders and the built-in set become shards in `folder` first.

    Args: holdout_rows: images that are held out, at most, of a set without a validation split.
    Raises: DataError.
    """
    return open_for_training(data, folder, holdout_rows)


def length_of(config: RunConfig, source: Source) -> RunLength:
    """The run's length in steps on this training set."""
    loop = config.loop
    return run_length(
        num_images=source.num_rows,
        batch_size=loop.batch_size,
        epochs=loop.epochs,
        warmup_epochs=loop.warmup_epochs,
        steps=loop.steps,
    )


def receive(message: Message, folder: RunFolder, view: ProgressView) -> None:
    """Act on what rank 0 says."""
    kind, content = message
    if kind == "progress":
        view.record(content)
    elif kind == "evaluation":
        view.evaluation(content)
    elif kind == "panel":
        folder.keep_panel(*content)
    elif kind == "broken":
        for entry in folder.add_broken(content)[:3]:
            view.say(f"could not be decoded: {entry['where']}: {entry['reason']} (see {folder.ledger.name})")
    elif kind == "failed":
        view.say(f"worker failed, {content}")
    elif kind == "note":
        view.say(f"note: {content}")
    elif kind == "started" and content > 0:
        view.say(f"continuing from step {content}")


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    import numpy
    import pyarrow
    import ray

    return {
        "mixmae": mixmae.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }


ArgumentsT = TypeVar("ArgumentsT", bound=RunArguments)


def run_command(
    argv: list[str] | None,
    *,
    program: str,
    about: str | None,
    recipes: Mapping[str, Callable[[], Any]],
    arguments_type: type[ArgumentsT],
    action: Callable[[ArgumentsT, str], int],
    kind: str = "recipe",
) -> int:
    """The command line of a pipeline that takes a recipe: parse, run, and turn what users get wrong into a sentence.

    Args: kind: the word for what it takes, if not a recipe.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"usage: python pipelines/{program} {kind.upper()} [options]\n\n{kind}s:\n{list_recipes(recipes)}\n"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{about}\n{usage}\n{kind.upper()} --help lists the options and fields.")
        return 0 if argv else 2
    try:
        recipe = find_recipe(argv[0], recipes, kind)
        arguments = tyro.cli(
            arguments_type,
            args=argv[1:],
            default=arguments_type(config=recipe()),  # type: ignore[call-arg]
            prog=f"{program} {recipe.__name__}",
            description=recipe.__doc__,
            # A recipe settles which encoder and which method: their fields are flags, not subcommands.
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        fail(error, code=2)
    try:
        return action(arguments, recipe.__name__)
    except (ValueError, FileNotFoundError, TrainingStopped) as error:
        fail(error)
    except WorkersFailed as error:
        fail(
            f"{error}\nThe worker's log with the whole trace is below the session's folder logs/train (see Ray's "
            "dashboard or /tmp/ray/session_latest). The same command continues from the last checkpoint."
        )


def elapsed_since(start: float) -> str:
    """Seconds since a time.monotonic(), in words."""
    return f"{time.monotonic() - start:.0f} s"
