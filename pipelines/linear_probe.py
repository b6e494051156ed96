"""Train a linear layer on a frozen encoder: what its features tell of the classes as they are.

    python pipelines/linear_probe.py RECIPE --pretrained PATH [--data PATH] [--cached] [--output FOLDER] [any field]

PATH of --pretrained is as in pipelines/finetune.py; without it the encoder is a random one, to compare with. Crops and
flips are drawn anew in every epoch, on Ray, as MAE does. With --cached each image goes through the encoder once, in its
central crop, and the layer is trained on these features in this process, in seconds. Both leave a run's folder that
evaluate.py and predict.py take.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from mixmae.convert import Preprocessing
from mixmae.inference import FrozenEncoder, choose_device
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.linear_probe import LinearProbeJob
from mixmae.jobs.record import read_begun
from mixmae.metrics import UNKNOWN, top_k_accuracy
from mixmae.probing.fit import LinearProbeConfig, train_probe
from mixmae.probing.linear import LinearProbe
from mixmae.stores import refuse_store
from mixmae.tracking import JournalTracker
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.loop import step_seed
from pipelines import finetune
from pipelines.command import recipe_command
from pipelines.console import elapsed_since
from pipelines.finetune import prepare, track, train_classifier
from pipelines.recipes import LINEAR_PROBE_RECIPES
from pipelines.run import output_folder


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line: of which weights, where to read, where to write, on what to run."""

    cached: bool = False
    """Extract features once, without crops and flips, and train on them in this process, without Ray."""
    experiment: str = "mixmae-linear-probe"
    """MLflow experiment."""


def linear_probe(arguments: Arguments, recipe: str) -> int:
    """Run or continue a linear probe.   Returns: the process's exit status."""
    if arguments.cached:
        refuse_store(arguments.output, "a probe on cached features")
    folder = output_folder(arguments, recipe)
    before = read_begun(folder)
    if before is not None and before.cached != arguments.cached:
        raise ValueError(
            f"{folder.path} holds a probe {'without' if arguments.cached else 'with'} --cached: continue it so, or "
            "choose another --output."
        )
    if arguments.cached:
        return probe_cached(arguments, recipe)
    prepared = prepare(arguments, recipe, LINEAR_PROBE_RECIPES[recipe](), LinearProbeJob)
    return 0 if prepared is None else train_classifier(*prepared)


def probe_cached(arguments: Arguments, recipe: str) -> int:
    """Extract features and train the head on them.   Returns: the process's exit status."""
    config = arguments.config
    if config.loop.steps is not None or config.ema_decay is not None or arguments.workers not in (0, 1):
        raise ValueError(
            "--cached trains whole epochs in this process: leave out --loop.steps (--loop.epochs is its length), "
            "--ema-decay and --workers, or --cached."
        )
    device = choose_device(arguments.device)
    prepared = prepare(arguments, recipe, LINEAR_PROBE_RECIPES[recipe](), LinearProbeJob, cached=True)
    if prepared is None:
        return 0
    run, job = prepared
    run.use_gpu = device.type == "cuda"
    batch_size = min(job.config.loop.batch_size, job.source.num_rows)
    loop = replace(job.config.loop, batch_size=batch_size, micro_batch_size=None)
    job = track(run, replace(job, config=replace(job.config, loop=loop)))
    print(
        f"Probing cached features of {job.source.name} ({job.source.num_rows} images): {job.num_classes} classes, "
        f"validation on {job.validation.num_rows} images of {job.validation.name}\noutput {run.folder.path}"
    )
    status: str = "FAILED"
    metrics: dict[str, float] = {}
    try:
        metrics = train_on_features(job, device)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print("\nInterrupted. The same command begins again.", flush=True)
        return run.exit_status
    finally:
        tags = {"checkpoint": str(run.folder.best)} if metrics else {}
        run.end(status, tags=tags, metrics=metrics, step=job.length.total_steps)
    run.write(status="finished", mlflow=job.ref, checkpoint=str(run.folder.best), metrics=metrics)
    print(
        f"Finished: top-1 {metrics['final/top1']:.2%}, top-5 {metrics['final/top5']:.2%} (validation), "
        f"{metrics['train/top1']:.2%} of the training images\n"
        f"classifier  {run.folder.best}\n"
        f"{run.ui_line}"
    )
    return 0


def train_on_features(job: LinearProbeJob, device: torch.device) -> dict[str, float]:
    """Extract features, train the head on them, save the classifier as the run's best.

    Returns: what MLflow shows of the run: final/top1, final/top5, final/loss, train/top1.
    """
    config = job.config
    torch.manual_seed(step_seed(config.loop.seed, "init"))
    model = job.build_model().to(device)
    assert isinstance(model, LinearProbe)
    frozen = FrozenEncoder(
        encoder=model.encoder,
        preprocessing=Preprocessing(image_size=config.augment.size, mean=config.pixel_mean, std=config.pixel_std),
        crop_pct=config.crop_pct,
        device=device,
        bfloat16=config.loop.precision == "bfloat16",
    )
    start = time.monotonic()
    features, labels, *_ = frozen.features(job.source)
    judged, classes, *_ = frozen.features(job.validation)
    print(f"{len(features) + len(judged)} images through the encoder in {elapsed_since(start)}", flush=True)

    start = time.monotonic()
    probe = LinearProbeConfig(
        epochs=config.loop.epochs,
        warmup_epochs=config.loop.warmup_epochs,
        batch_size=config.loop.batch_size,
        optim=config.optim,
        seed=config.loop.seed,
    )
    curves = train_probe(model.head, features, labels, probe, validation=(judged, classes))
    print(f"the layer trained {config.loop.epochs:g} epochs in {time.monotonic() - start:.1f} s", flush=True)
    with contextlib.closing(JournalTracker(job.folder, system_metrics=False)) as tracker:
        for epoch, values in enumerate(zip(curves.loss, curves.train_top1, curves.val_top1, strict=True), start=1):
            names = ("train/loss", "train/top1", ClassificationJob.best_metric)
            tracker.log_metrics(dict(zip(names, values, strict=True)), step=round(epoch * job.length.steps_per_epoch))

    with torch.no_grad():
        logits = model.head(judged.to(device)).cpu()
    known = classes != UNKNOWN
    accuracy = top_k_accuracy(logits, classes)
    metrics = {
        "val/top1": accuracy.top[1],
        "val/top5": accuracy.top[5],
        "val/loss": F.cross_entropy(logits[known], classes[known]).item(),
    }
    state = job.describe() | {"position": {"step": job.length.total_steps}, "metrics": metrics}
    save_checkpoint(job.best[1], model=model, optimizer=None, state=state)
    return {
        **{name.replace("val/", "final/"): value for name, value in metrics.items()},
        "train/top1": curves.train_top1[-1],
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return recipe_command(
        linear_probe, Arguments, argv, program="linear_probe.py", about=__doc__, recipes=LINEAR_PROBE_RECIPES
    )


if __name__ == "__main__":
    sys.exit(main())
