"""Pretrain an encoder with MixMAE, SimMIM or MAE.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/pretrain.py RECIPE [--data PATH] [--output FOLDER] [--workers N] [any field of the recipe]

The same command again continues a run that was interrupted, and does nothing for one that is finished.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torch import Tensor, nn

from mixmae.data.blocks import eval_batches
from mixmae.data.chunks import Int64Array
from mixmae.data.order import Plan
from mixmae.data.source import DataError, Source
from mixmae.data.streams import TrainStream
from mixmae.encoders.base import Encoder
from mixmae.encoders.build import build_encoder
from mixmae.jobs.config import PretrainConfig, to_json
from mixmae.methods.build import build_method, images_mixed
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from mixmae.probing.features import extract_features
from mixmae.probing.ridge import OnlineProbeConfig, choose_images, probe_features
from mixmae.share import WorkerShare
from mixmae.step import StepOutput
from mixmae.tracking import MlflowTracker, RunRef
from mixmae.training.loop import Batch, LoopConfig, TrainState, step_seed
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength
from mixmae.training.worker import EvaluationSkipped
from pipelines.recipes import PRETRAIN_RECIPES
from pipelines.runs import RunArguments, begin, elapsed_since, length_of, open_data, run_command

PANEL_ROWS = 3
"""Mixes that a panel shows, each of other images."""
HELDOUT_IMAGES = 60
"""Held-out images that the reconstruction loss is measured on; a multiple of 2, 3, 4 and 5."""
PROBE_BATCH = 64
"""Images that a worker's share of the probe is put through the encoder at once."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line: where to read, where to write, on what to run."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    experiment: str = "mixmae-pretrain"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """The labelled images that the encoder is judged on along the way."""

    source: Source
    rows: Int64Array
    k: int
    num_classes: int

    @property
    def description(self) -> str:
        return f"{len(self.rows)} images of {self.num_classes} classes of {self.source.name}"


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """A pretraining run as the workers see it (the TrainingJob of mixmae.training.worker)."""

    config: PretrainConfig
    source: Source
    heldout: Source
    run: RunRef
    probe: Probe | None = None
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

    @property
    def ema_decay(self) -> None:
        return None

    @property
    def best(self) -> None:
        return None

    @property
    def evaluates_untrained(self) -> bool:
        return self.probe is not None

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

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator, first_sample: int) -> StepOutput:
        device = next(model.parameters()).device
        images = self.config.normalise(batch.images.to(device, non_blocking=True))
        return model(images, generator=generator, first_sample=first_sample)

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """The probe. (The loss of the held-out images comes with the panel.)

        The workers pause and share the images: a process beside them would take the same cores of a laptop, and one
        on a busy GPU would hold up its worker, for which all others wait, where eight of them need an eighth each.
        Images are decoded once a run, and nothing is drawn from a global generator: the weights stay as without it.
        """
        if self.probe is None:
            return {}
        start = time.perf_counter()
        share: tuple[Tensor, Tensor] | str
        try:
            share = self._probe_share(model, self.probe, rank, num_workers)
        except Exception as error:  # the others wait for this share: say it to them, and never end a pretraining
            share = f"{type(error).__name__}: {error}"
        shares: list[Any] = [share]
        if num_workers > 1:
            shares = [None] * num_workers
            dist.all_gather_object(shares, share)
        failed = next((part for part in shares if isinstance(part, str)), None)
        if failed is not None:
            raise EvaluationSkipped(f"no probe ({failed})")
        features, labels = (torch.cat([part[kind] for part in shares]) for kind in (0, 1))
        try:
            metrics = probe_features(features, labels, self.probe.k)
        except (ValueError, RuntimeError) as error:
            raise EvaluationSkipped(f"no probe ({error})") from error
        return {**metrics, "perf/probe_s": time.perf_counter() - start}

    def _probe_share(self, model: nn.Module, probe: Probe, rank: int, num_workers: int) -> tuple[Tensor, Tensor]:
        """This worker's features and labels."""
        config, encoder = self.config, model.encoder
        assert isinstance(encoder, Encoder)
        device = next(model.parameters()).device
        batches = _probe_batches(probe, config.augment.size, rank, num_workers)
        if not batches:  # more workers than images
            return torch.empty(0, encoder.channels[-1]), torch.empty(0, dtype=torch.int64)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.precision == "bfloat16"):
            return extract_features(encoder, batches, mean=config.pixel_mean, std=config.pixel_std)

    def draw_panel(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        device = next(model.parameters()).device
        images = self.config.normalise(self._heldout_images.to(device))
        if not len(images):
            return None, {}
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
        rows = np.arange(min(HELDOUT_IMAGES, self.heldout.num_rows))
        batch = next(eval_batches(self.heldout, self.config.augment.image_size, batch_size=len(rows), rows=rows))
        broken = [record.row for record in batch.broken]
        images = batch.images[torch.from_numpy(~np.isin(rows, broken))]
        return images[: len(images) // num_images * num_images]


@lru_cache(maxsize=1)
def _probe_batches(probe: Probe, size: tuple[int, int], rank: int, num_workers: int) -> list[Any]:
    """A worker's images of the probe, decoded once and kept in its memory: 2000 of 224 px are 300 MB over all."""
    rows = np.array_split(probe.rows, num_workers)[rank]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // num_workers)) as pool:
        return list(eval_batches(probe.source, size, batch_size=PROBE_BATCH, rows=rows, pool=pool))


def choose_probe(config: OnlineProbeConfig, source: Source, heldout: Source) -> Probe | None:
    """Choose the images of the probe, or say why there is none.

    They are held-out ones; where these give less than a quarter of what is asked for, the training images, whose
    classes pretraining does not see.
    """
    if config.images == 0:
        return None
    best: Probe | None = None
    for part in (heldout, source):
        try:
            labels = part.read_labels() if part.has_labels else np.full(part.num_rows, -1)
        except (DataError, OSError) as error:
            print(f"note: no probe (the labels of {part.name} cannot be read: {error})")
            return None
        rows = choose_images(labels, config.images)
        if best is None or len(rows) > len(best.rows):
            best = Probe(source=part, rows=rows, k=config.k, num_classes=len(np.unique(labels[rows])))
        if len(best.rows) >= config.images / 4:
            break
    assert best is not None
    if len(best.rows) <= config.k:
        few = f"only {len(best.rows)} images" if len(best.rows) else "no two classes"
        print(f"note: no probe by classes ({few} with labels to judge by)")
        return None
    print(f"probe: kNN and a linear layer on {best.description} (a guess: {1 / best.num_classes:.1%})")
    return best


def pretrain(arguments: Arguments, recipe: str) -> int:
    """Run or continue a pretraining run.   Returns: the process's exit status."""
    config = arguments.config
    config.micro_batch(arguments.workers)
    check_method(config)
    run = begin(arguments, recipe)
    if run is None:
        return 0
    source, heldout = open_data(arguments.data, run.folder.path.parent / "data", HELDOUT_IMAGES)
    if heldout.num_rows < images_mixed(config.method):
        print(f"note: {heldout.num_rows} held-out images are fewer than a mix takes: no panels and no held-out loss")
    length = length_of(config, source)
    run.settle_data(source)
    probe = choose_probe(config.probe, source, heldout)
    run.claim_cluster()
    ref = run.track(length, tags={"stage": "pretrain", "probe": probe.description if probe else "none"})
    job = PretrainJob(config=config, source=source, heldout=heldout, run=ref, probe=probe, facts=run.facts)
    print(f"{'Continuing' if run.is_continued else 'Pretraining'} {run.describe(source, length)}")
    start = time.monotonic()
    done = run.train(job, ref, final_metrics)
    if done is None:
        return 130
    state, checkpoint = done
    knn = state.metrics.get("probe/knn_top1")
    print(
        f"Finished in {elapsed_since(start)}: loss {state.metrics['loss']:.4f}, "
        f"held-out {state.metrics.get('heldout/loss', float('nan')):.4f}"
        f"{'' if knn is None else f', kNN top-1 {knn:.1%}'}\n"
        f"checkpoint  {checkpoint}\n"
        f"panel       {run.folder.last_panel()}\n"
        f"MLflow UI   {ref.ui_command}"
    )
    run.say_broken()
    return 0


def final_metrics(state: TrainState) -> dict[str, float]:
    """One number each, of the end: final/loss and, where measured, final/heldout_loss, /knn_top1, /linear_top1."""
    names = {"loss": "loss", "heldout/loss": "heldout_loss"}
    names |= {"probe/knn_top1": "knn_top1", "probe/linear_top1": "linear_top1"}
    return {f"final/{name}": state.metrics[key] for key, name in names.items() if key in state.metrics}


def check_method(config: PretrainConfig) -> None:
    """See that the encoder can do what the method needs.   Raises: ValueError."""
    with torch.device("meta"):
        build_method(build_encoder(config.sized_encoder()), config.method)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(
        argv,
        program="pretrain.py",
        about=__doc__,
        recipes=PRETRAIN_RECIPES,
        arguments_type=Arguments,
        action=pretrain,
    )


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.pretrain import main as _main

    sys.exit(_main())
