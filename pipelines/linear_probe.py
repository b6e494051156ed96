"""Train a linear layer on a frozen encoder: what its features say of the classes as they are.

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
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from mixmae.convert import Preprocessing
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import FinetuneConfig
from mixmae.metrics import UNKNOWN, top_k_accuracy
from mixmae.probing.fit import ProbeConfig, train_probe
from mixmae.probing.linear import LinearHead, LinearProbe
from mixmae.tracking import MlflowTracker, RunRef, finish_run
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.loop import step_seed
from pipelines import finetune
from pipelines.features import FrozenEncoder, choose_place
from pipelines.finetune import BEST_METRIC, FinetuneJob, Prepared, prepare, track
from pipelines.recipes import LINEAR_PROBE_RECIPES
from pipelines.runs import elapsed_since, length_of, run_command, run_folder


@dataclass(frozen=True, kw_only=True)
class Arguments(finetune.Arguments):
    """The command line: of which weights, where to read, where to write, on what to run."""

    cached: bool = False
    """Extract features once, without crops and flips, and train on them in this process, without Ray."""
    experiment: str = "mixmae-linear-probe"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeJob(FinetuneJob):
    """A linear probe as the workers see it: a finetuning whose encoder stays as it is."""

    stage = "linear_probe"
    doing = "Probing"
    recipes = LINEAR_PROBE_RECIPES

    def build_model(self) -> nn.Module:
        model = super().build_model()
        assert isinstance(model, ImageClassifier)
        return LinearProbe(model.encoder, LinearHead(model.head.in_features, self.num_classes))

    def evaluate(self, model: nn.Module, *, rank: int, num_workers: int) -> dict[str, float]:
        """As finetuning does, all workers with the norm's statistics of the first, which are the ones that are kept."""
        if num_workers > 1:
            for buffer in model.head.buffers():  # type: ignore[union-attr]
                dist.broadcast(buffer, src=0)
        return super().evaluate(model, rank=rank, num_workers=num_workers)


def linear_probe(arguments: Arguments, recipe: str) -> int:
    """Run or continue a linear probe.   Returns: the process's exit status."""
    folder = run_folder(arguments, recipe)
    before = folder.begun()
    if before is not None and before.get("cached", False) != arguments.cached:
        raise ValueError(
            f"{folder.path} holds a probe {'without' if arguments.cached else 'with'} --cached: continue it so, or "
            "choose another --output."
        )
    loop = arguments.config.loop
    if arguments.cached and (loop.steps is not None or arguments.config.ema_decay is not None or arguments.workers > 1):
        raise ValueError(
            "--cached trains whole epochs in this process: leave out --loop.steps (--loop.epochs says how long), "
            "--ema-decay and --workers, or --cached."
        )
    return probe_cached(arguments, recipe) if arguments.cached else finetune.finetune(arguments, recipe, LinearProbeJob)


def probe_cached(arguments: Arguments, recipe: str) -> int:
    """Extract features and train the head on them.   Returns: the process's exit status."""
    device = choose_place(arguments.device)
    prepared = prepare(arguments, recipe, LinearProbeJob, {"cached": True})
    if prepared is None:
        return 0
    run, source, validation = prepared.run, prepared.source, prepared.validation
    run.use_gpu = device.type == "cuda"
    loop = run.arguments.config.loop
    batch_size = min(loop.batch_size, source.num_rows)
    config = replace(run.arguments.config, loop=replace(loop, batch_size=batch_size, micro_batch_size=None))
    run.arguments = replace(run.arguments, config=config)
    length = length_of(config, source)
    ref = track(run, length, prepared.classes, prepared.pretrained, LinearProbeJob.stage)
    print(
        f"Probing cached features of {source.name} ({source.num_rows} images): {len(prepared.classes)} classes, "
        f"validation on {validation.num_rows} images of {validation.name}\noutput {run.folder.path}"
    )
    status: str = "FAILED"
    metrics: dict[str, float] = {}
    try:
        metrics = _train_on_features(prepared, ref, device)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print("\nInterrupted. The same command begins again.", flush=True)
        return 130
    finally:
        with contextlib.suppress(Exception):  # the store's trouble must not hide the run's
            finish_run(
                ref, status=status, tags={"checkpoint": str(run.folder.best)} if metrics else {}, metrics=metrics
            )
    run.folder.write(run.content | {"status": "finished", "checkpoint": str(run.folder.best), "metrics": metrics})
    print(
        f"Finished: top-1 {metrics['final/top1']:.2%}, top-5 {metrics['final/top5']:.2%} (validation), "
        f"{metrics['train/top1']:.2%} of the training images\n"
        f"classifier  {run.folder.best}\n"
        f"MLflow UI   {ref.ui_command}"
    )
    return 0


def _train_on_features(prepared: Prepared, ref: RunRef, device: torch.device) -> dict[str, float]:
    """Extract, train, keep the classifier in the run's folder.   Returns: what MLflow shows of the run."""
    run, config = prepared.run, prepared.run.arguments.config
    assert isinstance(config, FinetuneConfig)
    torch.manual_seed(step_seed(config.loop.seed, "init"))
    job = prepared.job(LinearProbeJob, ref)
    model = job.build_model().to(device)
    assert isinstance(model, LinearProbe)
    frozen = FrozenEncoder(
        encoder=model.encoder,
        preprocessing=Preprocessing(image_size=config.augment.size, mean=config.pixel_mean, std=config.pixel_std),
        resize_share=config.resize_share,
        device=device,
        bfloat16=config.loop.precision == "bfloat16",
    )
    start = time.monotonic()
    features, labels = frozen.features(prepared.source)
    judged, classes = frozen.features(prepared.validation)
    print(f"{len(features) + len(judged)} images through the encoder in {elapsed_since(start)}", flush=True)

    start = time.monotonic()
    probe = ProbeConfig(
        epochs=config.loop.epochs,
        warmup_epochs=config.loop.warmup_epochs,
        batch_size=config.loop.batch_size,
        optim=config.optim,
        seed=config.loop.seed,
    )
    curves = train_probe(model.head, features, labels, probe, validation=(judged, classes))
    print(f"the layer trained {config.loop.epochs:g} epochs in {time.monotonic() - start:.1f} s", flush=True)
    with contextlib.closing(MlflowTracker(ref, system_metrics=False)) as tracker:
        for epoch, values in enumerate(zip(curves.loss, curves.train_top1, curves.val_top1, strict=True), start=1):
            names = ("train/loss", "train/top1", BEST_METRIC)
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
    save_checkpoint(run.folder.best, model=model, optimizer=None, state=state)
    return {
        **{name.replace("val/", "final/"): value for name, value in metrics.items()},
        "train/top1": curves.train_top1[-1],
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(
        argv,
        program="linear_probe.py",
        about=__doc__,
        recipes=LINEAR_PROBE_RECIPES,
        arguments_type=Arguments,
        action=linear_probe,
    )


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.linear_probe import main as _main

    sys.exit(_main())
