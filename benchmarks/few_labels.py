"""What pretraining is worth when labels are few: finetuning from it and from scratch, with the same steps and images.

    python benchmarks/few_labels.py [--sets digits moths FOLDER] [--labels 5 20 all] [--seeds 0 1 2]
    python benchmarks/few_labels.py --sets digits --pretrain-on moths

Takes the recipes demo and demo_finetune, on one core in this process. Each seed makes one pretraining per set, on all
training images without their labels, and chooses the images that keep their label. Both arms then train on these, and
are compared by top-1 on the validation set at their last step. With --pretrain-on, pretraining sees the images of
another set instead: learned on one set, used on another. Prints a table and writes table.md; the same command again
continues where it was interrupted, and another one uses the same pretrainings.

The arms share all settings but one: layer decay, which protects pretrained layers, makes no sense from scratch.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/few_labels.py`

from mixmae.data.prepare import open_for_training
from mixmae.data.shards.plan import built_in
from mixmae.data.source import Source, read_rows
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.config import to_json
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.writing import write_text, writing
from pipelines.command import command
from pipelines.recipes.demo import demo
from pipelines.recipes.finetune import demo_finetune


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Finetuning from pretraining, beside training from scratch, with few labels."""

    sets: tuple[str, ...] = ("digits", "moths")
    """digits: scikit-learn's handwritten digits. moths: the built-in set. Or folders of images, with a folder
    per class: a fifth of the images is for validation."""
    pretrain_on: str | None = None
    """The set of pretraining; default: each set itself."""
    labels: tuple[int | Literal["all"], ...] = (5, 20, "all")
    """Labelled images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own pretraining, choice of labelled images, and run of each arm."""
    output: Path = Path("runs/few_labels")
    """Folder of the images, the pretrained encoders, results.csv and the table."""


FLIP = {"digits": 0.0}
"""Probability that an image is mirrored: digits are not; other sets as in the recipes."""
STEPS = {5: 300, 20: 500, "all": 1500}
"""Of finetuning, for each number of labels."""

Images = list[tuple[bytes, int]]


@functools.cache
def read_set(name: str, output: Path) -> tuple[Images, Images]:
    """The training and the validation images of a set, each as an encoded file with its class."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = []
        for pixels, label in zip(digits.images, digits.target, strict=True):
            grey = Image.fromarray(np.uint8(np.rint(pixels * (255 / 16)))).resize((64, 64), Image.Resampling.BICUBIC)
            file = io.BytesIO()
            grey.convert("RGB").save(file, "PNG")
            images.append((file.getvalue(), int(label)))
        order = np.random.default_rng(0).permutation(len(images))
        return [images[i] for i in order[:1397]], [images[i] for i in order[1397:]]
    sources = open_for_training(name, output, 0)
    if not all(part.has_labels for part in sources):
        raise ValueError(f"{name} has no labels: give a folder with one folder of images per class.")
    parts = [
        [(sample.data, int(sample.label)) for sample in read_rows(part, np.arange(part.num_rows))] for part in sources
    ]
    if built_in(name):
        return parts[0], parts[1]
    images = parts[0] + parts[1]
    order = np.random.default_rng(0).permutation(len(images))
    held_out = len(images) // 5
    return [images[i] for i in order[held_out:]], [images[i] for i in order[:held_out]]


def write_folder(folder: Path, train: Images, validation: Images) -> Path:
    """Write images as people keep them: train/CLASS/NUMBER.jpg (or .png), and val likewise.

    A folder that is there is whole: it gets its name last.   Returns: the folder.
    """
    if folder.exists():
        return folder
    final, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    for split, images in (("train", train), ("val", validation)):
        for number, (data, label) in enumerate(images):
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            path = folder / split / f"{label:02d}" / f"{number:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder.rename(final)


def choose(images: Images, labels: int | str, seed: int) -> Images:
    """Draw `labels` images of every class, by the seed; all of them if there are not as many."""
    rng = np.random.default_rng(seed)
    classes = np.array([label for _, label in images])
    rows = [rng.permutation(np.flatnonzero(classes == label)) for label in np.unique(classes)]
    return [images[row] for few in rows for row in few[: None if labels == "all" else int(labels)]]


def open_set(folder: Path, name: str, *chosen: Any) -> tuple[Source, Source]:
    """A set's training and validation images, or those that `chosen` (labels per class, seed) leaves of the former."""
    train, validation = read_set(name, folder)
    part = "-".join(map(str, chosen)) or "all"
    kept = choose(train, *chosen) if chosen else train
    images = write_folder(folder / folder_of(name) / f"images-{part}", kept, validation)
    return open_for_training(str(images), folder / folder_of(name) / "shards", 0)


def pretrained_encoder(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Pretrain on a set's training images, unless that has been done.   Returns: the encoder's state dict."""
    file = folder / folder_of(name) / f"encoder-{seed}.pt"
    if not file.exists():
        config = demo()
        augment = replace(config.augment, flip=FLIP.get(name, config.augment.flip))
        config = replace(config, augment=augment, loop=replace(config.loop, seed=seed))
        job = PretrainJob.of(config, *open_set(folder, name), data=name, folder=folder)
        model = build_seeded(job)
        state = train_in_process(job, model)
        print(f"{folder_of(name)}, seed {seed}: pretrained for {state.step} steps, loss {state.metrics['loss']:.3f}")
        torch.save(model.encoder.state_dict(), file.with_suffix(".partial"))  # type: ignore[union-attr]
        file.with_suffix(".partial").rename(file)
    return torch.load(file, weights_only=True)


def finetune(name: str, labels: int | str, seed: int, encoder: dict[str, Any] | None, folder: Path) -> float:
    """Train a classifier on the labelled images.   Args: encoder: None = from scratch.   Returns: top-1, 0..1."""
    config = demo_finetune()
    augment = replace(config.augment, flip=FLIP.get(name, config.augment.flip))
    loop = replace(config.loop, seed=seed, steps=STEPS.get(labels, 500), evaluate_every_epochs=10_000)
    optim = config.optim if encoder else replace(config.optim, layer_decay=None)
    config = replace(config, augment=augment, loop=loop, optim=optim)
    source, validation = open_set(folder, name, labels, seed)
    job = ClassificationJob.of(config, source, validation, data=name, folder=folder, pretrained=None)
    model = build_seeded(job)
    if encoder:
        model.encoder.load_state_dict(encoder)  # type: ignore[union-attr]
    train_in_process(job, model)
    return job.evaluate(model.eval(), rank=0, num_workers=1)["val/top1"]


def folder_of(name: str) -> str:
    """What a set's files are kept under."""
    return Path(name).name.replace(":", "-")


def mean_and_std(shares: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in per cent."""
    std = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{std}"


Row = tuple[str, str, str, str]
"""Set, set of pretraining ("" = from scratch), labels per class, seed."""


def few_labels(arguments: Arguments) -> int:
    """Make all runs and the table.   Returns: the exit status.   Raises: ValueError as check_settings."""
    torch.set_num_threads(1)
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json")
    results = read_results(folder / "results.csv")

    def top1(name: str, start: str, labels: int | str, seed: int) -> float:
        row = (folder_of(name), folder_of(start), str(labels), str(seed))
        if row not in results:
            encoder = pretrained_encoder(start, seed, folder) if start else None
            results[row] = finetune(name, labels, seed, encoder, folder)
            write_results(folder / "results.csv", results)
            print(f"{row[0]}, {labels} labels per class, seed {seed}, from {row[1] or 'scratch'}: {results[row]:.3f}")
        return results[row]

    lines = [
        "| set | pretrained on | labels per class | from pretraining, top-1, % | from scratch, top-1, % | gains |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name in arguments.sets:
        start = arguments.pretrain_on or name
        for labels in arguments.labels:
            pairs = [(top1(name, start, labels, seed), top1(name, "", labels, seed)) for seed in arguments.seeds]
            pretrained, scratch = map(mean_and_std, zip(*pairs, strict=True))
            gains = ", ".join(f"{100 * (a - b):+.1f}" for a, b in pairs)
            lines.append(f"| {folder_of(name)} | {folder_of(start)} | {labels} | {pretrained} | {scratch} | {gains} |")
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def check_settings(file: Path) -> None:
    """Keep the recipes beside the results, which are of no use beside those of others.   Raises: ValueError."""
    recipes = {"pretrain": to_json(demo()), "finetune": to_json(demo_finetune()), "steps": list(STEPS.items())}
    text = json.dumps(recipes, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file.parent} has results of other recipes: give another --output, or delete the folder.")
    write_text(file, text)


def read_results(table: Path) -> dict[Row, float]:
    """Top-1 of the runs that have been made."""
    if not table.exists():
        return {}
    with table.open(encoding="utf-8") as file:
        return {(a, b, c, d): float(value) for a, b, c, d, value in list(csv.reader(file))[1:]}


def write_results(table: Path, results: dict[Row, float]) -> None:
    """Write all of them."""
    with writing(table) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "pretrained_on", "labels_per_class", "seed", "top1"])
        writer.writerows([*row, value] for row, value in results.items())


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(few_labels, Arguments, argv, program="few_labels.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
