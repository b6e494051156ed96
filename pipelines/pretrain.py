"""Pretrain an encoder with MixMAE, SimMIM or MAE.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/pretrain.py RECIPE [--data PATH] [--output FOLDER] [--workers N] [any field of the recipe]

The same command again continues a run that was interrupted, and does nothing for one that is finished.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import nn

import mixmae
from mixmae.data.blocks import eval_batch
from mixmae.data.order import Plan
from mixmae.data.sources import Source, open_train_and_held_out
from mixmae.data.storage import plain_place
from mixmae.data.streams import TrainStream
from mixmae.encoders.build import build_encoder
from mixmae.flops import count_macs, count_parameters
from mixmae.methods.build import build_method, images_mixed
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from mixmae.step import StepOutput
from mixmae.tracking import (
    MlflowTracker,
    RunRef,
    create_run,
    finish_run,
    log_file,
    reopen_run,
    resolve_uri,
)
from mixmae.training.loop import Batch, LoopConfig, TrainingStopped, step_seed
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength, run_length
from mixmae.training.worker import Message, WorkersFailed, choose_device, connect, fit, require_resources
from pipelines.console import ProgressView, fail
from pipelines.recipes import find_recipe, list_recipes
from pipelines.recipes.config import PretrainConfig, differences, to_json

PANEL_ROWS = 3
"""Mixes that a panel shows, each of other images."""
HELDOUT_IMAGES = 60
"""Held-out images that the reconstruction loss is measured on; a multiple of 2, 3, 4 and 5."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: where to read, where to write, on what to run."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
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
    experiment: str = "mixmae-pretrain"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the output folder's name."""
    ray_address: str | None = None
    """Ray cluster. Default: RAY_ADDRESS (set by `ray job submit`), else one on this machine for this run."""
    max_failures: int = 3
    """Restarts from the last checkpoint, after a worker died, before giving up."""
    checkpoints_to_keep: int = 3
    """Newest checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """A pretraining run as the workers see it (the TrainingJob of mixmae.training.worker)."""

    config: PretrainConfig
    source: Source
    heldout: Source
    run: RunRef
    facts: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint says beside the position: data, versions."""

    @property
    def loop(self) -> LoopConfig:
        return self.config.loop

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def length(self) -> RunLength:
        return length_of(self.config, self.source)

    def build_model(self) -> nn.Module:
        return build_method(build_encoder(self.config.sized_encoder()), self.config.method)

    @contextlib.contextmanager
    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> Iterator[Iterator[Batch]]:
        window_rows = int(self.facts["data"]["window_rows"])
        plan = Plan(chunk_sizes=self.source.chunk_sizes, seed=self.config.loop.seed, window_rows=window_rows)
        stream = TrainStream(
            self.source,
            plan,
            self.config.augment,
            global_batch=self.loop.batch_size,
            micro_batch=self.config.micro_batch(num_workers),
            rank=rank,
            world_size=num_workers,
            start_step=start_step,
            stop_step=self.length.total_steps,
            settings=self.config.stream,
        )
        with contextlib.closing(stream):
            yield iter(stream)

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator, first_sample: int) -> StepOutput:
        device = next(model.parameters()).device
        images = self._normalise(batch.images.to(device, non_blocking=True))
        return model(images, generator=generator, first_sample=first_sample)

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        device = next(model.parameters()).device
        images = self._normalise(self._heldout_images.to(device))
        generator = torch.Generator().manual_seed(step_seed(0, "heldout"))
        loss = model(images, generator=generator).loss.item()
        num_images = images_mixed(self.config.method)
        shown = images[: PANEL_ROWS * num_images]
        generator = torch.Generator().manual_seed(step_seed(0, "panel"))
        # A mix a row, each of other images.
        pairs = {"partners": cyclic_partners(len(shown), num_images)[::num_images].to(device)} if num_images > 1 else {}
        pictures = model(shown, generator=generator, with_pictures=True, **pairs).pictures
        caption = "Outlined cells are shown to the model; in reconstructions they are the original's pixels."
        if self.config.method.normalise_targets:
            caption += " Hidden cells are un-normalised with the mean and spread of the original's patch."
        panel = reconstruction_panel(pictures, mean=self.config.pixel_mean, std=self.config.pixel_std, caption=caption)
        return panel, {"heldout/loss": loss}

    def open_tracker(self) -> MlflowTracker:
        return MlflowTracker(self.run)

    def describe(self) -> dict[str, Any]:
        return {"config": to_json(self.config), "mlflow": vars(self.run), **self.facts}

    @cached_property
    def _heldout_images(self) -> torch.Tensor:
        """The first images of the held-out set, uint8 (N, C, H, W), N a multiple of the images a mix."""
        num_images = images_mixed(self.config.method)
        count = min(HELDOUT_IMAGES, self.heldout.num_rows) // num_images * num_images
        return eval_batch(self.heldout, range(count), self.config.augment.image_size)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) -> normalised float32, on the images' device."""
        mean = torch.tensor(self.config.pixel_mean, device=images.device)[:, None, None]
        std = torch.tensor(self.config.pixel_std, device=images.device)[:, None, None]
        return (images.float() / 255 - mean) / std


def length_of(config: PretrainConfig, source: Source) -> RunLength:
    """The run's length in steps on this training set."""
    loop = config.loop
    return run_length(
        num_images=source.num_rows,
        batch_size=loop.batch_size,
        epochs=loop.epochs,
        warmup_epochs=loop.warmup_epochs,
        steps=loop.steps,
    )


def open_data(data: str | None, folder: Path) -> tuple[Source, Source]:
    """The training and the held-out source; image folders and the built-in set become shards in `folder` first.

    Raises: DataError.
    """
    from pipelines.make_shards import default_shapes, is_image_folder, make_shards

    if data is None:
        place = str(default_shapes(folder / "shapes"))
    elif is_image_folder(data):
        path = Path(data).expanduser().resolve()
        place = str(make_shards(path, folder / f"{path.name}-{step_seed(0, str(path)) % 16**6:06x}").folder)
    else:
        place = data
    return open_train_and_held_out(place, HELDOUT_IMAGES)


class RunFolder:
    """The output folder of one run: run.json says what it is and whether it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._file = self.path / "run.json"

    def read(self) -> dict[str, Any] | None:
        """run.json, or None in a new folder.   Raises: ValueError if the folder is something else's."""
        if self._file.is_file():
            return json.loads(self._file.read_text())
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and not a run of this program: choose another --output.")
        return None

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

    def keep_panel(self, step: int, png: bytes) -> None:
        (self.path / "panels").mkdir(exist_ok=True)
        (self.path / "panels" / f"step_{step:07d}.png").write_bytes(png)

    def last_panel(self) -> Path | None:
        return max((self.path / "panels").glob("step_*.png"), default=None)


def pretrain(arguments: Arguments, recipe: str) -> int:
    """Run or continue a pretraining run.   Returns: the process's exit status."""
    config = arguments.config
    config.micro_batch(arguments.workers)
    with torch.device("meta"):  # says at once if the encoder cannot do what the method needs
        build_method(build_encoder(config.sized_encoder()), config.method)
    data_name = f"-{Path(plain_place(arguments.data)).name}" if arguments.data else ""
    folder = RunFolder(arguments.output or Path("runs") / f"{recipe}{data_name}")
    before = folder.read()
    if before is not None and before["status"] == "preparing":
        before = None  # it never began to train: nothing to continue, and nothing that must stay as it was
    if before is None and arguments.resume:
        raise ValueError(f"{folder.path} holds no run to resume: correct --output, or leave --resume out to start one.")
    content: dict[str, Any] = {"status": "preparing", "recipe": recipe, "config": to_json(config)}
    refuse_changes(before, content, folder.path)
    if before is not None and before["status"] == "finished":
        print(f"This run is finished: {before['checkpoint']}\nTo train again choose another --output.")
        return 0

    uri = resolve_uri(arguments.mlflow_uri, folder.path.parent)
    if before is None:
        folder.write(content)
    source, heldout = open_data(arguments.data, folder.path.parent / "data")
    length = length_of(config, source)
    content["data"] = {
        "name": source.name,
        "digest": source.digest,
        "source": plain_place(arguments.data) if arguments.data else "built-in",
        # Decided once a run: a lost index file must not change the order of a run that is continued.
        "window_rows": config.window_rows_for(source.exact_reads),
    }
    refuse_changes(before, content, folder.path)
    if before is not None and "data" in before:
        content["data"] = before["data"]

    connect(arguments.ray_address, num_workers=arguments.workers)
    use_gpu = choose_device(arguments.device)
    require_resources(num_workers=arguments.workers, use_gpu=use_gpu)
    if use_gpu and config.loop.precision == "float32":
        print("note: float32 on a GPU; --loop.precision bfloat16 is about twice as fast")

    run = start_tracking(arguments, uri, folder, before, content, length, use_gpu)
    content |= {"status": "running", "mlflow": vars(run)}
    folder.write(content)
    job = PretrainJob(
        config=config, source=source, heldout=heldout, run=run, facts={"data": content["data"], "versions": versions()}
    )
    print(
        f"{'Continuing' if before and 'mlflow' in before else 'Pretraining'} {recipe} on {source.name} "
        f"({source.num_rows} images): {length.total_steps} steps of {config.loop.batch_size} images, "
        f"{arguments.workers} {'GPU' if use_gpu else 'CPU'} worker{'s' * (arguments.workers > 1)}\n"
        f"output {folder.path}\nMLflow {run.uri}"
    )
    start = time.monotonic()
    status = "FAILED"
    try:
        with ProgressView(length.total_steps) as view:
            state, checkpoint = fit(
                job,
                folder=folder.path,
                name="checkpoints",
                num_workers=arguments.workers,
                use_gpu=use_gpu,
                max_failures=arguments.max_failures,
                checkpoints_to_keep=arguments.checkpoints_to_keep,
                on_message=lambda message: receive(message, folder, view),
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print("\nInterrupted. The same command continues from the last checkpoint.", flush=True)
        return 130
    finally:
        broken = folder.broken()
        with contextlib.suppress(Exception):  # the store's trouble must not hide the run's
            if broken:
                log_file(run, folder.ledger)
            finish_run(run, status=status, tags={"checkpoint": checkpoint} if status == "FINISHED" else {})
    folder.write(content | {"status": "finished", "checkpoint": checkpoint, "metrics": state.metrics})
    print(
        f"Finished in {time.monotonic() - start:.0f} s: loss {state.metrics['loss']:.4f}, "
        f"held-out {state.metrics.get('heldout/loss', float('nan')):.4f}\n"
        f"checkpoint  {checkpoint}\n"
        f"panel       {folder.last_panel()}\n"
        f"MLflow UI   {run.ui_command}"
    )
    if broken:
        print(f"{len(broken)} images could not be decoded and were replaced by others: {folder.ledger}")
    return 0


def refuse_changes(before: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a run that was begun before would be continued as another one, as far as is known now."""
    if before is None:
        return
    changed = differences(before["config"], now["config"])
    if "data" in before and "data" in now and before["data"]["digest"] != now["data"]["digest"]:
        changed.append(f"data was {before['data']['name']} ({before['data']['digest']}) and is {now['data']['name']}")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{path} holds a run begun with other settings ({'; '.join(changed[:3])}{more}): continue it with the "
            "ones it was begun with, or choose another --output."
        )


def start_tracking(
    arguments: Arguments,
    uri: str,
    folder: RunFolder,
    before: dict[str, Any] | None,
    content: dict[str, Any],
    length: RunLength,
    use_gpu: bool,
) -> RunRef:
    """The MLflow run to log to: the interrupted run's own, or a new one with all that is known before training."""
    config = arguments.config
    if before is not None and "mlflow" in before:
        run = RunRef(**before["mlflow"])
        if arguments.mlflow_uri in (None, run.uri) and reopen_run(run):
            return run
        print(f"note: the interrupted run {run.run_id} is not in {uri}; its curves go on in a new one")
    size = config.augment.image_size
    with torch.device("meta"):
        encoder = build_encoder(config.sized_encoder())
    assert isinstance(encoder, nn.Module)
    return create_run(
        uri=uri,
        experiment=arguments.experiment,
        name=arguments.run_name or folder.path.name,
        params={
            **to_json(config),
            "recipe": content["recipe"],
            "lr": config.optim.peak_lr(config.loop.batch_size),
            "weight_decay": config.optim.weight_decay,
            "epochs": config.loop.epochs,
            "steps": length.total_steps,
            "batch_size": config.loop.batch_size,
            "image_size": size if isinstance(size, int) else size[0],
            "seed": config.loop.seed,
            "data.window_rows": content["data"]["window_rows"],
            "workers": arguments.workers,
            "gpu": int(use_gpu),
            "params_m": round(count_parameters(encoder) / 1e6, 3),
            "gmacs": round(count_macs(encoder, size, in_channels=config.encoder.in_channels).total / 1e9, 3),
        },
        tags={"stage": "pretrain", "output": str(folder.path), **{f"version.{k}": v for k, v in versions().items()}},
        dataset=content["data"],
    )


def receive(message: Message, folder: RunFolder, view: ProgressView) -> None:
    """Act on what rank 0 says."""
    kind, content = message
    if kind == "progress":
        view.record(content)
    elif kind == "panel":
        folder.keep_panel(*content)
    elif kind == "broken":
        for entry in folder.add_broken(content)[:3]:
            view.say(f"could not be decoded: {entry['where']}: {entry['reason']} (see {folder.ledger.name})")
    elif kind == "failed":
        view.say(f"worker failed, {content}")
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


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    usage = f"usage: python pipelines/pretrain.py RECIPE [options]\n\nrecipes:\n{list_recipes()}\n"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{usage}\nRECIPE --help lists the options and fields.")
        return 0 if argv else 2
    try:
        recipe = find_recipe(argv[0])
        arguments = tyro.cli(
            Arguments,
            args=argv[1:],
            default=Arguments(config=recipe()),
            prog=f"pretrain.py {recipe.__name__}",
            description=recipe.__doc__,
            # A recipe settles which encoder and which method: their fields are flags, not subcommands.
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        fail(error, code=2)
    try:
        return pretrain(arguments, recipe.__name__)
    except (ValueError, TrainingStopped) as error:
        fail(error)
    except WorkersFailed as error:
        fail(
            f"{error}\nThe worker's log with the whole trace is below the session's folder logs/train (see Ray's "
            "dashboard or /tmp/ray/session_latest). The same command continues from the last checkpoint."
        )


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.pretrain import main as _main

    sys.exit(_main())
