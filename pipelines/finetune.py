"""Finetune a pretrained encoder to classify images, or train one from scratch.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/finetune.py RECIPE [--pretrained PATH] [--data PATH] [--output FOLDER] [--workers N] [any field]

PATH of --pretrained is a run's folder or one of its checkpoints, an encoder file, a hub folder, or weights of any other
format in docs/weights.md. The same command again continues a run that was interrupted, and does nothing for one that is
finished.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.convert import Preprocessing, Weights, describe, digest_of, load_checked, read_weights, save_encoder
from mixmae.data.blocks import eval_batches
from mixmae.data.images.mixup import mix_batch
from mixmae.data.order import Plan
from mixmae.data.source import DataError, Source
from mixmae.data.streams import TrainStream
from mixmae.encoders.build import build_encoder, config_at_size, config_from_json, size_name
from mixmae.finetune.classification import ImageClassifier, Mix, classification_step
from mixmae.jobs.config import FinetuneConfig, to_json
from mixmae.metrics import UNKNOWN, label_ranks
from mixmae.probing.features import predict_logits
from mixmae.share import WorkerShare
from mixmae.step import StepOutput
from mixmae.tracking import MlflowTracker, RunRef, tag_run
from mixmae.training.checkpoint import read_state
from mixmae.training.loop import Batch, LoopConfig, TrainState
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength
from pipelines.recipes import FINETUNE_RECIPES
from pipelines.runs import (
    Run,
    RunArguments,
    begin,
    elapsed_since,
    length_of,
    open_data,
    run_command,
    run_folder,
    weights_of,
)

HELDOUT_IMAGES = 10_000
"""Most images that are held out of a set without a validation split; never more than a tenth of it."""
EVAL_BATCH = 64
"""Images that a worker evaluates at once."""
BEST_METRIC = "val/top1"
INITIAL_FILE = "initial.safetensors"
"""The pretrained encoder as it was loaded, in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line: from which weights, where to read, where to write, on what to run."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    pretrained: Path | None = None
    """Weights to start from: a run's folder or checkpoint, an encoder file, a hub folder, official files. Their
    architecture takes the recipe's place, unless fields of the encoder are given. Without it: from scratch."""
    experiment: str = "mixmae-finetune"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """A finetuning run as the workers see it (the TrainingJob of mixmae.training.worker)."""

    stage: ClassVar[str] = "finetune"
    """What MLflow calls such runs."""
    doing: ClassVar[str] = "Finetuning"
    recipes: ClassVar[Mapping[str, Callable[[], FinetuneConfig]]] = FINETUNE_RECIPES

    config: FinetuneConfig
    source: Source
    validation: Source
    num_classes: int
    folder: Path
    """Of the run: the workers keep the best weights here."""
    initial: Path | None
    """The encoder to start from, as keep_initial wrote it; None: from scratch."""
    run: RunRef
    facts: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint says beside the position: data, versions, names of the classes."""

    @property
    def loop(self) -> LoopConfig:
        if self.config.divergence is None:
            return self.config.loop
        return replace(self.config.loop, max_loss=self.config.divergence * math.log(max(2, self.num_classes)))

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def length(self) -> RunLength:
        return length_of(self.config, self.source)

    @property
    def ema_decay(self) -> float | None:
        return self.config.ema_decay

    @property
    def best(self) -> tuple[str, Path]:
        return BEST_METRIC, self.folder / "best"

    @property
    def evaluates_untrained(self) -> bool:
        return False

    def build_model(self) -> nn.Module:
        model = ImageClassifier(build_encoder(self.config.sized_encoder()), self.num_classes)
        if self.initial is not None:
            initial = safetensors.torch.load_file(self.initial)
            model.load_state_dict(model.state_dict() | initial)
        return model

    @contextlib.contextmanager
    def open_batches(self, *, rank: int, num_workers: int, start_step: int) -> Iterator[Iterator[Batch]]:
        window_rows = int(self.facts["data"]["window_rows"])
        plan = Plan(chunk_sizes=self.source.chunk_sizes, seed=self.config.loop.seed, window_rows=window_rows)
        stream = TrainStream(
            self.source,
            plan,
            self.config.augment,
            share=WorkerShare(
                batch_size=self.loop.batch_size,
                micro_batch_size=self.config.micro_batch(num_workers),
                rank=rank,
                num_workers=num_workers,
            ),
            start_step=start_step,
            stop_step=self.length.total_steps,
            config=self.config.stream,
        )
        with contextlib.closing(stream):
            yield iter(stream)

    def step(self, model: nn.Module, batch: Any, generator: torch.Generator, first_sample: int) -> StepOutput:
        device = next(model.parameters()).device
        images = self.config.normalise(batch.images.to(device, non_blocking=True))
        mix, smoothing = self._mix, self.config.mixup.label_smoothing
        if (batch.labels == UNKNOWN).all():  # teaches nothing, but all workers must go on alike
            nothing = {} if mix else {"top1": torch.zeros((), device=device)}
            return StepOutput(loss=0.0 * model(images).float().sum(), metrics=nothing)
        return classification_step(
            model, images, batch.labels, generator, first_sample, mix=mix, label_smoothing=smoothing
        )

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """Loss, top-1 and top-5 of the whole validation set, each worker looking at its part."""
        config = self.config
        device = next(model.parameters()).device
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1, top-5
        rows = np.array_split(np.arange(self.validation.num_rows), num_workers)[rank]
        if len(rows):  # decoded in this process: a task of Ray's could wait for the CPU that this worker holds
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // num_workers)) as pool:
                batches = eval_batches(
                    self.validation,
                    config.augment.image_size,
                    batch_size=EVAL_BATCH,
                    rows=rows,
                    resize_share=config.resize_share,
                    pool=pool,
                )
                with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.precision == "bfloat16"):
                    logits, labels = predict_logits(model, batches, mean=config.pixel_mean, std=config.pixel_std)
            known = labels != UNKNOWN
            sums = _sums(logits[known], labels[known]).to(device)
        if num_workers > 1:
            dist.all_reduce(sums)
        count, loss, top1, top5 = sums.tolist()
        return {"val/loss": loss / count, "val/top1": top1 / count, "val/top5": top5 / count}

    def draw_panel(self, model: nn.Module) -> tuple[None, dict[str, float]]:
        return None, {}

    def open_tracker(self) -> MlflowTracker:
        return MlflowTracker(self.run)

    def describe(self) -> dict[str, Any]:
        return {"config": to_json(self.config), "mlflow": vars(self.run), **self.facts}

    @cached_property
    def _mix(self) -> Mix | None:
        mixup, num_classes = self.config.mixup, self.num_classes
        if not (mixup.probability and (mixup.mixup or mixup.cutmix)):
            return None
        return lambda images, labels, generator: mix_batch(mixup, images, labels, num_classes, generator)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(4,) float64: images, sum of the cross entropy, images with the class first, and among the first five."""
    ranks = label_ranks(logits, labels)
    ranks[logits.isnan().any(dim=1)] = max(5, logits.shape[1])  # a model that has diverged is never right
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([torch.tensor(float(len(labels))).double(), loss, (ranks < 1).sum(), (ranks < 5).sum()])


@dataclass(frozen=True)
class Pretrained:
    """The weights that a run starts from."""

    path: Path
    digest: str
    run_id: str | None
    """The MLflow run that they are of, if they say so."""
    weights: Weights | None
    """None for a run that is continued, which has them in its own folder."""

    def to_json(self) -> dict[str, str | None]:
        return {"path": str(self.path), "digest": self.digest, "run_id": self.run_id}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run with all that was checked before its MLflow run and its workers start."""

    run: Run
    source: Source
    validation: Source
    classes: list[str]
    pretrained: Pretrained | None

    def job(self, job_type: type[FinetuneJob], ref: RunRef) -> FinetuneJob:
        """What the workers do."""
        folder = self.run.folder.path
        return job_type(
            config=self.run.arguments.config,  # type: ignore[arg-type]
            source=self.source,
            validation=self.validation,
            num_classes=len(self.classes),
            folder=folder,
            initial=folder / INITIAL_FILE if self.pretrained else None,
            run=ref,
            facts=self.run.facts,
        )


def prepare(
    arguments: Arguments, recipe: str, job_type: type[FinetuneJob], extra: Mapping[str, Any] | None = None
) -> Prepared | None:
    """Read the weights, claim the folder, look at the data: what users get wrong is said here.

    Args: extra: what run.json keeps beside the config.
    Returns: None if the run is finished, which is said.
    """
    arguments.config.micro_batch(arguments.workers)
    pretrained, arguments = take_pretrained(arguments, recipe, job_type.recipes)
    run = begin(arguments, recipe, {"pretrained": pretrained and pretrained.to_json(), **(extra or {})})
    if run is None:
        return None
    source, validation = open_data(arguments.data, run.folder.path.parent / "data", HELDOUT_IMAGES)
    classes = take_classes(source, validation)
    run.content["classes"] = run.facts["classes"] = classes
    run.settle_data(source)
    if pretrained is None:
        print("note: no --pretrained weights: starting from random ones")
    elif pretrained.weights is not None:
        keep_initial(pretrained, arguments.config, run.folder.path)
    return Prepared(run=run, source=source, validation=validation, classes=classes, pretrained=pretrained)


def finetune(arguments: Arguments, recipe: str, job_type: type[FinetuneJob] = FinetuneJob) -> int:
    """Run or continue a run that trains a classifier.   Returns: the process's exit status."""
    prepared = prepare(arguments, recipe, job_type)
    if prepared is None:
        return 0
    run, source, validation, classes = prepared.run, prepared.source, prepared.validation, prepared.classes
    length = length_of(run.arguments.config, source)
    run.claim_cluster()
    ref = track(run, length, classes, prepared.pretrained, job_type.stage)
    job = prepared.job(job_type, ref)
    print(
        f"{'Continuing' if run.is_continued else job.doing} {run.describe(source, length)}\n"
        f"{len(classes)} classes, validation on {validation.num_rows} images of {validation.name}"
    )
    start = time.monotonic()
    done = run.train(job, ref, lambda state: results(state, run))
    if done is None:
        return 130
    state, checkpoint = done
    final = results(state, run)
    print(
        f"Finished in {elapsed_since(start)}: top-1 {final['final/top1']:.2%}, top-5 {final['final/top5']:.2%}, "
        f"loss {final['final/loss']:.4f} (validation)\n"
        f"best        {run.folder.best}  top-1 {final['best/top1']:.2%} at step {final['best/step']:.0f}\n"
        f"checkpoint  {checkpoint}\n"
        f"MLflow UI   {ref.ui_command}"
    )
    run.say_broken()
    return 0


def take_pretrained(
    arguments: Arguments, recipe: str, recipes: Mapping[str, Callable[[], FinetuneConfig]] = FINETUNE_RECIPES
) -> tuple[Pretrained | None, Arguments]:
    """Read the pretrained weights, and let their architecture take the recipe's place.

    The architecture, and the pixel normalisation, are those of the file where it says them and the command line does
    not; drop path and image size stay the recipe's.
    Returns: the weights, and the arguments with the encoder that they are for.
    Raises: ValueError if weights and encoder do not fit; FileNotFoundError.
    """
    if arguments.pretrained is None:
        return None, arguments
    config, usual = arguments.config, recipes[recipe]()
    free = [name for name in ("pixel_mean", "pixel_std") if getattr(config, name) == getattr(usual, name)]
    # Flags of drop path and size do not name an architecture.
    own_size = replace(usual.encoder, drop_path=config.encoder.drop_path, image_size=config.encoder.image_size)
    keeps_encoder = config.encoder != own_size

    path = arguments.pretrained.expanduser().resolve()
    before = run_folder(arguments, recipe).begun()
    if before is not None and (before.get("pretrained") or {}).get("path") == str(path):
        # As it was begun, whatever has become of the file since.
        begun = before["config"]
        changes: dict[str, Any] = {name: tuple(begun[name]) for name in free}
        if not keeps_encoder:
            encoder = config_from_json(begun["encoder"])
            changes["encoder"] = replace(encoder, drop_path=config.encoder.drop_path)
        pretrained = Pretrained(path, before["pretrained"]["digest"], before["pretrained"]["run_id"], None)
        return pretrained, replace(arguments, config=replace(config, **changes))

    weights = read_weights(weights_of(path))
    metadata = weights.metadata
    run_id = metadata.source.get("run_id") if metadata else None
    pretrained = Pretrained(path, digest_of(weights.state), str(run_id) if run_id else None, weights)
    if metadata is None:
        print(f"note: {path} does not say its architecture ({weights.unknown}): taking the recipe's encoder")
        return pretrained, arguments
    changes = {name: getattr(metadata.preprocessing, name.removeprefix("pixel_")) for name in free}
    if not keeps_encoder:
        theirs = replace(metadata.encoder, drop_path=config.encoder.drop_path)
        changes["encoder"] = config_at_size(theirs, config.augment.image_size)
        if changes["encoder"] != config.sized_encoder():
            print(
                f"note: the encoder is the one of {path}, {describe(weights.state)}; the recipe's is "
                f"{size_name(config.encoder) or 'another one'}. Rates, drop path and length stay the recipe's."
            )
    return pretrained, replace(arguments, config=replace(config, **changes))


def keep_initial(pretrained: Pretrained, config: FinetuneConfig, folder: Path) -> None:
    """Fit the weights to the encoder and keep it in the run's folder, where every worker and every restart finds it.

    Raises: ValueError if they do not fit.
    """
    assert pretrained.weights is not None
    encoder = build_encoder(config.sized_encoder())
    assert isinstance(encoder, nn.Module)
    own = {name: value for name, value in pretrained.weights.state.items() if name.startswith("encoder.")}
    load_checked(encoder, replace(pretrained.weights, state=own), weights_of(pretrained.path))
    preprocessing = Preprocessing(image_size=config.augment.size, mean=config.pixel_mean, std=config.pixel_std)
    save_encoder(folder / INITIAL_FILE, encoder, preprocessing, source=pretrained.to_json(), overwrite=True)


def take_classes(source: Source, validation: Source) -> list[str]:
    """The names of the classes, numbers where there are no names, after a look at all labels.

    Raises: DataError if the labels are no classes that can be trained, or the validation set cannot judge them.
    """
    remedy = "give images in a folder for each class, shards with an integer column `label`, or tars with .cls files"
    if not source.has_labels:
        raise DataError(f"{source.name} has no labels, and a classifier needs them: {remedy} (docs/data.md)")
    labels, judged = source.read_labels(), validation.read_labels()
    known = labels[labels >= 0]
    if not len(known):
        raise DataError(f"no image of {source.name} has a class (all labels are -1): {remedy} (docs/data.md)")
    names = [str(name) for name in source.class_names or range(int(known.max()) + 1)]
    for part, values in ((source, known), (validation, judged)):
        if values.max() >= len(names):
            raise DataError(
                f"{part.name} has the label {values.max()}, but there are {len(names)} classes (0 to {len(names) - 1}"
                f"{'' if source.class_names else ', the largest label of the training images'}): correct the labels, "
                "or the names of the classes."
            )
    if not (judged >= 0).any():
        raise DataError(
            f"the validation set {validation.name} has no image with a class: label it, or leave it out, so that a "
            "tenth of the training images is held out."
        )
    shown = np.unique(known)
    if source.class_names is None and 2 * len(shown) <= len(names):
        raise DataError(
            f"the labels of {source.name} go up to {known.max()}, but only {len(shown)} of these numbers are used: "
            "number the classes from 0 without gaps."
        )
    if len(shown) < 2:
        raise DataError(f"all images of {source.name} are of one class: there is nothing to tell apart.")
    strangers = np.setdiff1d(judged[judged >= 0], shown)
    for count, what in (
        (len(labels) - len(known), "training images have no class and are left out"),
        (len(names) - len(shown), f"of {len(names)} classes have no training image"),
        (len(strangers), "classes of the validation set have no training image"),
        (len(shown) - len(np.unique(judged[judged >= 0])), "classes of the training set have no validation image"),
    ):
        if count > 0:
            print(f"note: {count} {what}")
    return names


def track(run: Run, length: RunLength, classes: list[str], pretrained: Pretrained | None, stage: str) -> RunRef:
    """Open the MLflow run; it and the pretraining run point at each other where both are in one store."""
    tags = {"stage": stage, "pretrained": str(pretrained.path) if pretrained else "none"}
    if pretrained and pretrained.run_id:
        tags["pretrained.run_id"] = pretrained.run_id
    ref = run.track(length, params={"classes": len(classes)}, tags=tags)
    if pretrained and pretrained.run_id:
        mark = "finetuned" if stage == "finetune" else stage
        tag_run(ref.uri, pretrained.run_id, f"{mark}.{ref.run_id}", run.folder.path.name)
    return ref


def results(state: TrainState, run: Run) -> dict[str, float]:
    """One number each: of the last evaluation, and of the best one."""
    best = read_state(run.folder.best)
    numbers = {f"final/{name}": state.metrics[f"val/{name}"] for name in ("top1", "top5", "loss")}
    numbers |= {f"best/{name}": best["metrics"][f"val/{name}"] for name in ("top1", "top5", "loss")}
    return {**numbers, "best/step": float(best["position"]["step"])}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(
        argv,
        program="finetune.py",
        about=__doc__,
        recipes=FINETUNE_RECIPES,
        arguments_type=Arguments,
        action=finetune,
    )


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.finetune import main as _main

    sys.exit(_main())
