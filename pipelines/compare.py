"""Compare ways to pretrain at equal time: how good are the features of each after the same seconds of training?

    python pipelines/compare.py [--data SOURCE] [--seconds 50] [--seeds 3] [--output DIR]

Every arm gets the same encoder, images, batch and seconds of training on one core of this machine (plain torch, no
Ray): as many steps as fit, with a schedule that ends there. Its frozen features are then judged by kNN and by a linear
probe on the validation split. Prints a table with mean and std over seeds, then in words which arms differ from the
untrained encoder, and writes results.csv and table.md.

Seconds are CPU time of the process: other programs on the machine do not shorten an arm's training.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixmae.data.blocks import eval_batches
from mixmae.data.channels import check_channels
from mixmae.data.prepare import open_for_training
from mixmae.data.source import Source
from mixmae.encoders.build import build_encoder
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.record import DataRecord
from mixmae.jobs.supervised import HELDOUT_IMAGES
from mixmae.methods.build import MethodConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from mixmae.probing.features import extract_features
from mixmae.probing.fit import small_set_probe, train_probe
from mixmae.probing.knn import KnnConfig, knn_classify
from mixmae.probing.linear import LinearHead
from mixmae.stores import refuse_store
from mixmae.training.loop import TrainState, step_seed
from mixmae.training.optim import OptimConfig
from mixmae.writing import write_text, writing
from pipelines.command import command
from pipelines.recipes import PRETRAIN_RECIPES, find_recipe

WARMUP_STEPS, TIMED_STEPS = 3, 20
"""Steps that are timed to find how many fit, after some that warm up."""
JUDGED_IMAGES = 2000
"""Most images of each split that kNN and probe see."""
UNTRAINED = "untrained"
"""The arm that the others are compared with."""
STANDARD_ERRORS = 3.0
"""A difference of means counts if it is above so many of its standard errors: with three seeds per arm, two arms that
are alike differ so in about 1 comparison of 25."""


def arms(config: PretrainConfig) -> dict[str, MethodConfig | None]:
    """The methods that are compared, on one encoder; None is the untrained encoder."""
    method = config.method
    if not isinstance(method, MixMAEConfig):
        raise ValueError(
            f"compare.py takes a MixMAE recipe and makes the other arms of it, not {type(method).__name__}"
        )
    base = replace(method, fill="mix", unmixing="attention", num_images=4)
    alone = replace(base, unmixing="none", pairing="all", dual=True, mask_token_share=0.0)
    return {
        UNTRAINED: None,
        "MixMAE, K = 4": base,
        "MixMAE, K = 2": replace(base, num_images=2),
        "MixMAE, K = 4, mix embedding, attention not masked": replace(base, unmixing="embedding"),
        "MixMAE, K = 4, attention not masked": replace(base, unmixing="none"),
        "hidden cells zero, 75 %": replace(alone, fill="zero"),
        "hidden cells shuffled, 75 %": replace(alone, fill="shuffle"),
        "MAE-style, 75 % (hidden cells zero and unseen)": replace(alone, fill="zero", unmixing="attention"),
        "SimMIM": SimMIMConfig(),
    }


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which arms, on which images, for how long."""

    recipe: str = "demo"
    """MixMAE recipe that gives encoder, images, batch and optimiser."""
    data: str | None = None
    """Labelled images (docs/data.md), as for pretraining. Default: the built-in moths."""
    seconds: float = 50.0
    """Training time of each arm and seed, on one core."""
    seeds: int = 3
    """Runs of each arm."""
    only: tuple[str, ...] = ()
    """Names of arms; default all."""
    output: Path = Path("runs/compare")
    """Folder of results.csv and table.md; arms and seeds that results.csv has are not run again."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One arm with one seed."""

    arm: str
    seed: int
    steps: int
    seconds: float
    """Of training, measured."""
    loss: float
    """Of the last steps; those of different methods cannot be compared."""
    knn: float
    """Top-1 accuracy of kNN on the validation split, 0..1."""
    probe: float
    """Top-1 accuracy of the linear probe."""


def pretrain_for(job: PretrainJob, seconds: float) -> tuple[nn.Module, TrainState, float]:
    """Pretrain in this process for about so many seconds.

    Returns: the model, the final state, and the seconds that it took; timing the steps beforehand does not count.
    """
    _train(job, WARMUP_STEPS)
    started = time.process_time()
    _train(job, TIMED_STEPS)
    per_step = (time.process_time() - started) / TIMED_STEPS
    steps = max(TIMED_STEPS, round(seconds / per_step))
    started = time.process_time()
    model, state = _train(job, steps)
    return model, state, time.process_time() - started


def _train(job: PretrainJob, steps: int) -> tuple[nn.Module, TrainState]:
    loop = replace(job.config.loop, steps=steps, log_every_steps=max(1, steps // 10), micro_batch_size=None)
    job = replace(job, config=replace(job.config, loop=loop))
    model = build_seeded(job)
    return model, train_in_process(job, model)


def judge(encoder: Any, config: PretrainConfig, train_set: Source, validation: Source) -> tuple[float, float]:
    """kNN and linear probe on frozen features: top-1 accuracies on the validation split, 0..1."""

    def features(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.arange(min(source.num_rows, JUDGED_IMAGES))
        batches = eval_batches(
            source, config.augment.size, batch_size=64, rows=rows, channels=config.encoder.in_channels
        )
        return extract_features(encoder, batches, mean=config.pixel_mean, std=config.pixel_std)

    train_features, train_labels = features(train_set)
    val_features, val_labels = features(validation)
    num_classes = int(max(train_labels.max(), val_labels.max())) + 1
    knn = knn_classify(
        train_features, train_labels, val_features, val_labels, num_classes=num_classes, config=KnnConfig()
    )
    torch.manual_seed(0)
    head = LinearHead(train_features.shape[1], num_classes)
    curves = train_probe(head, train_features, train_labels, small_set_probe(), validation=(val_features, val_labels))
    return knn.accuracy.top[1], curves.val_top1[-1]


def compare(arguments: Arguments) -> int:
    """Train and judge all arms and seeds, and write the table.   Returns: the process's exit status."""
    torch.set_num_threads(1)
    config = find_recipe(arguments.recipe, PRETRAIN_RECIPES)()
    chosen = arms(config)
    unknown = [name for name in arguments.only if name not in chosen]
    if unknown:
        raise ValueError(f"There is no arm {unknown[0]!r}: the arms are {', '.join(chosen)}.")
    refuse_store(arguments.output, "a comparison")
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_set, validation = open_for_training(arguments.data, arguments.output, HELDOUT_IMAGES)
    check_channels(train_set, config.encoder.in_channels)
    if not (train_set.has_labels and validation.has_labels):
        raise ValueError(f"{train_set.name} has no labels: kNN and the probe need the class of every image.")

    table = arguments.output / "results.csv"
    results = _read(table)
    finished = {(result.arm, result.seed) for result in results}
    for seed in range(arguments.seeds):
        for name in chosen:
            if (name, seed) in finished or (arguments.only and name not in arguments.only):
                continue
            arm = replace(config, loop=replace(config.loop, seed=seed))
            results.append(run_arm(name, chosen[name], arm, arguments.seconds, train_set, validation))
            print(f"{results[-1]}", flush=True)
            _write(table, results)
    text = f"{summary(results)}\n\n{verdict(results)}"
    write_text(arguments.output / "table.md", text + "\n")
    print(text)
    return 0


def run_arm(
    name: str,
    method: MethodConfig | None,
    config: PretrainConfig,
    seconds: float,
    train_set: Source,
    validation: Source,
) -> Result:
    """Train one arm with one seed, and judge it."""
    seed = config.loop.seed
    if method is None:
        torch.manual_seed(step_seed(seed, "init"))
        encoder, state, took = build_encoder(config.sized_encoder()), TrainState(), 0.0
    else:
        config = replace(config, method=method, optim=_optim(config.optim, method))
        data = DataRecord.of(train_set, train_set.name, config)
        job = PretrainJob(config=config, source=train_set, heldout=validation, data=data, folder=Path())
        model, state, took = pretrain_for(job, seconds)
        encoder = model.encoder  # type: ignore[assignment]
    knn, probe = judge(encoder, config, train_set, validation)
    loss = state.metrics.get("loss", float("nan"))
    return Result(arm=name, seed=seed, steps=state.step, seconds=round(took, 1), loss=loss, knn=knn, probe=probe)


def _optim(optim: OptimConfig, method: MethodConfig) -> OptimConfig:
    """SimMIM's loss, an absolute error, gets the clipping of its paper; all else is the recipe's."""
    return replace(optim, clip_grad_norm=5.0) if isinstance(method, SimMIMConfig) else optim


def summary(results: Sequence[Result]) -> str:
    """A Markdown table, the untrained encoder first: mean and sample std over seeds, in %."""
    lines = ["| pretraining | steps | kNN top-1, % | linear probe top-1, % |", "| --- | ---: | ---: | ---: |"]
    for name in _arms_of(results):
        own = [result for result in results if result.arm == name]
        lines.append(
            f"| {name} | {round(statistics.mean(r.steps for r in own))} | {_mean_and_std([r.knn for r in own])} | "
            f"{_mean_and_std([r.probe for r in own])} |"
        )
    return "\n".join(lines)


def verdict(results: Sequence[Result]) -> str:
    """Say of each arm, in a line of Markdown, whether its features are better than the untrained encoder's.

    The standard error of a difference of means is the root of the sum of both arms' std^2 / seeds.
    """
    names = _arms_of(results)
    if names[0] != UNTRAINED or len(names) < 2:
        return f"No verdict: it takes the arm {UNTRAINED!r} and another one (--only)."
    lines = [
        f"Compared with the untrained encoder; a difference of means counts from {STANDARD_ERRORS:.0f} of its standard "
        "errors on:",
        "",
    ]
    for name in names[1:]:
        arms = [[result for result in results if result.arm == arm] for arm in (name, UNTRAINED)]
        knn = _compare([[result.knn for result in arm] for arm in arms])
        probe = _compare([[result.probe for result in arm] for arm in arms])
        lines.append(f"- {name}: kNN {knn}; linear probe {probe}.")
    return "\n".join(lines)


def _compare(arms: Sequence[Sequence[float]]) -> str:
    """One accuracy of an arm (first) and of the untrained encoder, in 0..1, in words."""
    gap = 100 * (statistics.mean(arms[0]) - statistics.mean(arms[1]))
    if min(len(arm) for arm in arms) < 2:
        return f"{gap:+.1f} points, but one seed cannot tell"
    error = 100 * sum(statistics.variance(arm) / len(arm) for arm in arms) ** 0.5
    if abs(gap) <= STANDARD_ERRORS * error:
        return f"{gap:+.1f} points, no difference can be told (standard error {error:.1f})"
    return f"{'above' if gap > 0 else 'below'} by {abs(gap):.1f} points (standard error {error:.1f})"


def _arms_of(results: Sequence[Result]) -> list[str]:
    """Their names in the order of the results, but the untrained encoder first."""
    return sorted(dict.fromkeys(result.arm for result in results), key=lambda name: name != UNTRAINED)


def _mean_and_std(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


def _read(table: Path) -> list[Result]:
    if not table.is_file():
        return []
    with table.open(encoding="utf-8") as file:
        kinds = {"arm": str, "seed": int, "steps": int}
        return [Result(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def _write(table: Path, results: Sequence[Result]) -> None:
    with writing(table) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(vars(results[0])))
        writer.writeheader()
        writer.writerows(vars(result) for result in results)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(compare, Arguments, argv, program="compare.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
