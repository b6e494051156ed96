"""What the demo's dense tasks learn of scenes: from pretraining, from scratch, untrained, and from wrong labels.

    python benchmarks/scenes.py --pretrained runs/demo [--task detect] [--seeds 0 1 2] [--steps N]

One core, in this process, with the recipe demo_segment or demo_detect. Arms: `pretrained` and `scratch`; `untrained`,
the scratch model before its first step; `shuffled`, from pretraining on scenes whose classes change places, otherwise
in each image: where objects are can be learnt, what they are cannot, so it must stay far below. All are judged on the
true validation set. Prints a table and writes table.md (table_detect.md) and results.json; the same command again
continues where it was interrupted.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/scenes.py`

from mixmae.data.chunks import Int64Array
from mixmae.data.order import permutation
from mixmae.data.prepare import open_for_training
from mixmae.data.source import RowRange, Source
from mixmae.data.truth import Truth, decode_map, encode_map, with_maps
from mixmae.jobs.detection import DetectionJob
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretrained import keep_initial, read_pretrained
from mixmae.jobs.segmentation import SegmentationJob
from mixmae.jobs.supervised import SupervisedJob
from mixmae.writing import write_json, write_text
from pipelines.command import command
from pipelines.recipes.detect import demo_detect
from pipelines.recipes.segment import demo_segment

ARMS = ("pretrained", "scratch", "shuffled", "untrained")
RECIPES: dict[str, Any] = {"segment": demo_segment, "detect": demo_detect}
JOBS: dict[str, type[SupervisedJob]] = {"segment": SegmentationJob, "detect": DetectionJob}
FIGURES = {
    "segment": {"miou": "mIoU", "macc": "mean accuracy", "aacc": "pixel accuracy"},
    "detect": {"box_ap": "AP", "box_ap50": "AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"},
}
"""What is reported of each task, under val/, and what it is called."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    pretrained: Path
    """A pretraining run of the demo."""
    task: Literal["segment", "detect"] = "segment"
    """Classes of pixels, or objects."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own initial heads and order of images."""
    arms: tuple[str, ...] = ARMS
    """Which of pretrained, scratch, shuffled, untrained."""
    steps: int | None = None
    """In place of the recipe's."""
    threads: int = 1
    """Of the training."""
    output: Path = Path("runs/scenes")
    """Folder of the images and results."""


class ShuffledClasses(RowRange):
    """Scenes in which each class of objects is another one: which, differs from image to image."""

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        assert self.dense is not None
        count = len(self.dense.pixels)
        truths = []
        for truth in super().read_truth(chunk, rows_in_chunk):
            table = np.arange(256, dtype=np.uint8)
            table[1:count] = 1 + permutation(count - 1, truth.image_id)
            objects = truth.objects
            assert objects is not None
            labels = table[1 + objects.labels].astype(np.int64) - 1  # the ground comes before the objects' classes
            indices = encode_map(table[decode_map(truth, truth.size, count)])
            truths.append(replace(truth, segmentation=indices, objects=replace(objects, labels=labels)))
        return truths


def measure(arguments: Arguments, arm: str, seed: int, source: Source, validation: Source) -> dict[str, float]:
    """The figures of one run at its last step."""
    usual = RECIPES[arguments.task]()
    config = replace(usual, loop=replace(usual.loop, seed=seed, steps=arguments.steps or usual.loop.steps))
    folder, pretrained = arguments.output / f"{arguments.task}-{arm}-{seed}", None
    folder.mkdir(parents=True, exist_ok=True)
    if arm in ("pretrained", "shuffled"):
        pretrained, weights, config = read_pretrained(arguments.pretrained, config, usual, None)
        assert weights is not None
        keep_initial(pretrained, weights, config, folder)
    if arm == "shuffled":
        source = ShuffledClasses(base=source, start=0, stop=source.num_rows)
    job = JOBS[arguments.task].of(config, source, validation, data=None, folder=folder, pretrained=pretrained)
    model = build_seeded(job)
    if arm != "untrained":
        train_in_process(job, model)
    return dict(job.evaluate(model.eval(), rank=0, num_workers=1))


def run(arguments: Arguments) -> int:
    """Train and judge all arms.   Returns: the process's exit status."""
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    source, validation = open_for_training("scenes", arguments.output, 0)
    with_maps(source)
    figures = FIGURES[arguments.task]
    file = arguments.output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            steps = arguments.steps or RECIPES[arguments.task]().loop.steps
            key = " ".join([arm, str(seed), str(steps), *(["detect"] if arguments.task == "detect" else [])])
            if key not in results:
                results[key] = measure(arguments, arm, seed, source, validation)
                write_json(file, results)
                first, title = next(iter(figures.items()))
                print(f"{key}: {title} {results[key][f'val/{first}']:.4f}", flush=True)
    lines = [
        f"| arm | {' | '.join(f'{title} %' for title in figures.values())} | runs |",
        "| --- " * (len(figures) + 2) + "|",
    ]
    for arm in arguments.arms:
        runs = [
            value
            for key, value in results.items()
            if key.split()[0] == arm and key.endswith("detect") == (arguments.task == "detect")
        ]
        cells = [
            f"{100 * statistics.mean(values):.1f} ± {100 * (statistics.stdev(values) if len(values) > 1 else 0):.1f}"
            for values in ([run[f"val/{name}"] for run in runs] for name in figures)
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(runs)} |")
    table = "\n".join(lines)
    name = "table.md" if arguments.task == "segment" else "table_detect.md"
    write_text(arguments.output / name, table + "\n")
    print(table)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="scenes.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
