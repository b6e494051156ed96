"""What pretraining is worth when labels are few: finetuning from it and from scratch, with the same steps and images.

    python benchmarks/few_labels.py [--sets digits moths FOLDER] [--labels 5 20 all] [--seeds 0 1 2]
    python benchmarks/few_labels.py --sets digits --pretrain-on moths

Runs the pipelines as a user does. Each seed makes one pretraining per set, on all training images without their
labels, and chooses the images that keep their label. Both arms then train on these, and are compared by top-1 on the
validation set at their last step. Prints a table and writes table.md; the same command again continues where it was
interrupted.

With --pretrain-on, pretraining sees the images of another set instead: what is learnt on one set, and used on another.

The arms share all settings but one: layer decay, which protects pretrained layers, makes no sense from scratch.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/few_labels.py`

from mixmae.data.prepare import open_for_training
from mixmae.data.source import read_rows
from pipelines.command import command

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Finetuning from pretraining, beside training from scratch, with few labels."""

    sets: tuple[str, ...] = ("digits", "moths")
    """digits: scikit-learn's handwritten digits. moths: the built-in set. Or folders of images, a folder per class."""
    pretrain_on: str | None = None
    """The set of pretraining; default: each set itself."""
    labels: tuple[int | Literal["all"], ...] = (5, 20, "all")
    """Labelled images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own pretraining, choice of labelled images, and run of each arm."""
    workers: int = 0
    """Training processes of each run; 0: one per GPU or core."""
    output: Path = Path("runs/few_labels")
    """Folder of the runs and the table."""


FLAGS = {"digits": ("--augment.flip", "0")}
"""Of both pipelines, for each set: digits are not mirrored."""
HELDOUT_IMAGES = 1000
"""Validation images at most of a folder without a validation split."""
STEPS = {5: 300, 20: 500, "all": 1500}
"""Of finetuning, for each number of labels."""

Images = list[tuple[bytes, int]]


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
    train, validation = (
        [(sample.data, int(sample.label)) for sample in read_rows(part, np.arange(part.num_rows))]
        for part in open_for_training(name, output / "shards", HELDOUT_IMAGES)
    )
    return train, validation


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


def run(pipeline: str, recipe: str, output: Path, flags: Sequence[str]) -> dict[str, float]:
    """Run or continue one pipeline to its end.   Returns: its final metrics.   Raises: ValueError if it failed."""
    command = [sys.executable, str(PIPELINES / f"{pipeline}.py"), recipe, "--output", str(output), *flags]
    print(f"$ {' '.join(command[1:])}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"{pipeline}.py {recipe} failed, see above. The same command continues.")
    return json.loads((output / "run.json").read_text())["metrics"]


def folder_of(name: str) -> str:
    """What a set's runs are kept under."""
    return Path(name).name.replace(":", "-")


def pretrain(name: str, seed: int, arguments: Arguments) -> Path:
    """Pretrain on a set's training images, or continue to.   Returns: the run's folder."""
    folder = arguments.output.resolve() / folder_of(name)
    images = write_folder(folder / "images", *read_set(name, arguments.output.resolve()))
    run("pretrain", "demo", folder / f"pretrained-{seed}", ["--data", str(images), *common(name, seed, arguments)])
    return folder / f"pretrained-{seed}"


def compare(name: str, labels: int | str, seed: int, arguments: Arguments) -> tuple[float, float]:
    """Run both arms on a set.   Returns: top-1 on its validation set, from pretraining and from scratch, 0..1."""
    source = arguments.pretrain_on or name
    start = pretrain(source, seed, arguments)
    folder = arguments.output.resolve() / folder_of(name)
    train, validation = read_set(name, arguments.output.resolve())
    images = write_folder(folder / f"images-{labels}-{seed}", choose(train, labels, seed), validation)
    # An epoch of so few images is a few steps: the arms are compared at their ends.
    flags = [*common(name, seed, arguments), "--data", str(images), "--loop.steps", str(STEPS.get(labels, 500))]
    flags += ["--loop.evaluate-every-epochs", "1000", "--loop.checkpoint-every-epochs", "1000"]
    pretrained, scratch = folder / f"from-{folder_of(source)}-{labels}-{seed}", folder / f"from-scratch-{labels}-{seed}"
    return (
        run("finetune", "demo_finetune", pretrained, [*flags, "--pretrained", str(start)])["final/top1"],
        run("finetune", "demo_finetune", scratch, [*flags, "--optim.layer-decay", "None"])["final/top1"],
    )


def common(name: str, seed: int, arguments: Arguments) -> list[str]:
    """The flags of all runs on a set with a seed."""
    return ["--loop.seed", str(seed), "--workers", str(arguments.workers), *FLAGS.get(name, ())]


def mean_and_std(shares: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in per cent."""
    std = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{std}"


def few_labels(arguments: Arguments) -> int:
    """Make all runs and the table.   Returns: the exit status.   Raises: ValueError if a run failed."""
    pretrained_on = "" if arguments.pretrain_on is None else f", pretrained on {folder_of(arguments.pretrain_on)}"
    lines = [
        "| set | labels per class | from pretraining, top-1, % | from scratch, top-1, % | gain of each seed |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name in arguments.sets:
        for labels in arguments.labels:
            pairs = [compare(name, labels, seed, arguments) for seed in arguments.seeds]
            pretrained, scratch = map(mean_and_std, zip(*pairs, strict=True))
            gains = ", ".join(f"{100 * (a - b):+.1f}" for a, b in pairs)
            lines.append(f"| {folder_of(name)}{pretrained_on} | {labels} | {pretrained} | {scratch} | {gains} |")
    (arguments.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(few_labels, Arguments, argv, program="few_labels.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
