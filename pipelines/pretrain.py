"""Pretrain an encoder with MixMAE, SimMIM or MAE.

Ray Data streams the images, Ray Train runs the workers, MLflow keeps the record.

    python pipelines/pretrain.py RECIPE [--data PATH] [--output FOLDER] [--workers N] [any field of the recipe]

The same command again continues a run that was interrupted, and does nothing for one that is finished.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn

from mixmae.data.blocks import eval_batches
from mixmae.data.order import Plan
from mixmae.data.sources import Source
from mixmae.data.streams import TrainStream
from mixmae.encoders.build import build_encoder
from mixmae.methods.build import build_method, images_mixed
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from mixmae.step import StepOutput
from mixmae.tracking import MlflowTracker, RunRef
from mixmae.training.loop import Batch, LoopConfig, step_seed
from mixmae.training.optim import OptimConfig
from mixmae.training.schedule import RunLength
from pipelines.recipes import PRETRAIN_RECIPES
from pipelines.recipes.config import PretrainConfig, to_json
from pipelines.runs import RunArguments, begin, elapsed_since, length_of, open_data, run_command

PANEL_ROWS = 3
"""Mixes that a panel shows, each of other images."""
HELDOUT_IMAGES = 60
"""Held-out images that the reconstruction loss is measured on; a multiple of 2, 3, 4 and 5."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line: where to read, where to write, on what to run."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    experiment: str = "mixmae-pretrain"
    """MLflow experiment."""


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

    @property
    def ema_decay(self) -> None:
        return None

    @property
    def best(self) -> None:
        return None

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
        images = self.config.normalise(batch.images.to(device, non_blocking=True))
        return model(images, generator=generator, first_sample=first_sample)

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        return {}  # the loss of the held-out images comes with the panel

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


def pretrain(arguments: Arguments, recipe: str) -> int:
    """Run or continue a pretraining run.   Returns: the process's exit status."""
    config = arguments.config
    config.micro_batch(arguments.workers)
    with torch.device("meta"):  # says at once if the encoder cannot do what the method needs
        build_method(build_encoder(config.sized_encoder()), config.method)
    run = begin(arguments, recipe)
    if run is None:
        return 0
    source, heldout = open_data(arguments.data, run.folder.path.parent / "data", HELDOUT_IMAGES)
    if heldout.num_rows < images_mixed(config.method):
        print(f"note: {heldout.num_rows} held-out images are fewer than a mix takes: no panels and no held-out loss")
    length = length_of(config, source)
    run.settle_data(source)
    run.claim_cluster()
    ref = run.track(length, tags={"stage": "pretrain"})
    job = PretrainJob(config=config, source=source, heldout=heldout, run=ref, facts=run.facts)
    print(f"{'Continuing' if run.is_continued else 'Pretraining'} {run.describe(source, length)}")
    start = time.monotonic()
    done = run.train(job, ref)
    if done is None:
        return 130
    state, checkpoint = done
    print(
        f"Finished in {elapsed_since(start)}: loss {state.metrics['loss']:.4f}, "
        f"held-out {state.metrics.get('heldout/loss', float('nan')):.4f}\n"
        f"checkpoint  {checkpoint}\n"
        f"panel       {run.folder.last_panel()}\n"
        f"MLflow UI   {ref.ui_command}"
    )
    run.say_broken()
    return 0


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
