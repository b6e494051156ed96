"""Golden curves: the losses and gradient norms of the first ten steps of five tiny runs.

Each run is a real one but for its size and Ray: JPEGs in Parquet shards, the data order, crops, RandAugment and
erasing, the jobs' own models and steps, the optimiser and the loop. A refactoring leaves curves.json as it is; a change
of mathematics makes it anew, and its commit says why:

    python -m tests.golden.curves               # writes tests/golden/curves.json (half a minute)
    python -m tests.golden.curves --margins     # prints what TOLERANCE is chosen by (several minutes)

`RUNS` is in words of this file, and so is curves.json: where the library moves or renames something, the imports,
`_job` and `record` follow it, and nothing else does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mixmae.data.blocks import local_batches
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.data.images.mixup import MixupConfig
from mixmae.data.order import Plan
from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import Source
from mixmae.data.sources import open_source
from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig
from mixmae.encoders.vit import ViTConfig
from mixmae.jobs.classification import ClassificationJob
from mixmae.jobs.config import FinetuneConfig, PretrainConfig
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.record import DataRecord
from mixmae.methods.mae import MAEConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from mixmae.training.loop import LoopConfig, Silent, TrainState, step_seed, train
from mixmae.training.optim import OptimConfig, build_optimizer

FILE = Path(__file__).with_name("curves.json")

TOLERANCE = {"loss": 3e-6, "grad_norm": 1e-5}
"""Relative difference that the same mathematics may show on another machine.

Chosen with --margins on an AMD EPYC with AVX2 (2026-11-25, versions of constraints.txt). In tolerances:
- torch, MKL and oneDNN without AVX2, two threads, initial weights off by one rounding (6e-8) or by five: at most 0.08.
  AVX-512 is not measured; it adds in another order, as these stand-ins do. JPEGs decode, and crops resize, to the same
  bytes with and without vectors. Another version of torch, Pillow or simplejpeg may differ by more.
- The smallest effect of CHANGES is that of the weight decay: 11.6 for simmim, 39 to 229 for the others. The next is
  that of one percent of the learning rate: 123 to 453. All else moves a curve by 500 or more.
"""
TOLERANCE_L1 = {**TOLERANCE, "grad_norm": 1e-3}
"""That of SimMIM: the gradient of its absolute error jumps where a pixel's error changes sign, which rounding can do.
With other settings one such jump moved a norm by 1.3e-4."""

Settings = Mapping[str, Any]
"""What a run is, in JSON values."""
Curve = dict[str, list[float]]
"""`loss` and `grad_norm` (before clipping) of each step, by these names."""

SHARD_ROWS = (24, 20, 16)
BROKEN_ROW = 33
"""An image cut short: another one of its shard stands in for it."""
CLASSES = ("cat", "dog", "emu", "fox")

_COMMON: Settings = {
    "seed": 7,  # of initialisation, masks, group maps, drop path, mixup
    "order_seed": 7,  # of the data order, crops and further augmentation; the same one in a real run
    "window_rows": 20,
    "image_px": 64,
    "crop_scale": [0.2, 1.0],
    "batch_size": 8,
    "micro_batch_size": 8,
    "steps": 10,  # 80 of 60 images: the last steps are in the second epoch
    "warmup_steps": 3,
    "peak_lr": 2e-3,
    "weight_decay": 1.0,  # large, so that ten steps show a change of it
    "clip_grad_norm": None,
}
RUNS: dict[str, Settings] = {
    "mixmae_k2": {**_COMMON, "task": "mixmae", "num_images": 2, "clip_grad_norm": 0.045},
    "mixmae_k4": {**_COMMON, "task": "mixmae", "num_images": 4, "micro_batch_size": 4, "image_px": 96},
    "simmim": {**_COMMON, "task": "simmim"},
    "mae": {**_COMMON, "task": "mae"},
    "finetuning": {
        **_COMMON,
        "task": "finetuning",
        "seed": 8,
        "order_seed": 8,  # with 7 RandAugment asks Pillow 13 to keep 0 bits of an image, which it refuses
        "layer_decay": 0.8,
        "drop_path": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}

CHANGES: dict[str, Settings] = {
    "seed": {"seed": 9},
    "order seed": {"order_seed": 9},
    "window": {"window_rows": 40},
    "crop": {"crop_scale": [0.2, 0.99]},
    "weight decay": {"weight_decay": 0.8},
    "warmup": {"warmup_steps": 2},
    "length": {"steps": 11},
    "learning rate": {"peak_lr": 2.02e-3},
}
"""What the curves must tell from the run itself."""


def write_shards(folder: Path) -> Path:
    """Write the images that all runs see: 60 JPEGs of many sizes and four classes, one of them broken.

    They are made of hash bytes and integer arithmetic, so that they are the same bytes everywhere.
    Returns: the folder.
    """
    first = 0
    for number, rows in enumerate(SHARD_ROWS):
        images = [StoredImage(_jpeg(row), f"{row}.jpg", row * 7 % len(CLASSES)) for row in range(first, first + rows)]
        write_shard(folder / shard_name("train", number, len(SHARD_ROWS)), images, shard_schema(CLASSES))
        first += rows
    return folder


def _jpeg(row: int) -> bytes:
    """A smooth picture, 70 to 133 px each way."""
    content = np.frombuffer(hashlib.shake_256(f"picture {row}".encode()).digest(2 + 6 * 5 * 3), dtype=np.uint8)
    height, width = (70 + int(byte) % 64 for byte in content[:2])
    picture = Image.fromarray(content[2:].reshape(6, 5, 3)).resize((width, height), Image.Resampling.BICUBIC)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90, colorspace="RGB", colorsubsampling="420")
    return data[: len(data) // 2] if row == BROKEN_ROW else data


def _job(settings: Settings, source: Source) -> PretrainJob | ClassificationJob:
    """The settings as the library's own job."""
    task = settings["task"]
    image_px, drop_path = settings["image_px"], settings.get("drop_path", 0.0)
    swin = SwinConfig(
        image_size=image_px,
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_sizes=(12, 7, 6, 3),
        drop_path=drop_path,
    )
    vit = ViTConfig(image_size=image_px, embed_dim=32, depth=3, num_heads=4)
    decoder = DecoderConfig(dim=32, depth=1, num_heads=4)
    crop = {"image_size": image_px, "crop_scale": tuple(settings["crop_scale"])}
    common: dict[str, Any] = {
        "encoder": vit if task == "mae" else swin,
        "optim": OptimConfig(
            base_lr=settings["peak_lr"] * 256 / settings["batch_size"],
            weight_decay=settings["weight_decay"],
            clip_grad_norm=settings["clip_grad_norm"],
            layer_decay=settings.get("layer_decay"),
        ),
        "loop": LoopConfig(
            epochs=settings["steps"],
            warmup_epochs=settings["warmup_steps"],
            steps=settings["steps"],
            batch_size=settings["batch_size"],
            micro_batch_size=settings["micro_batch_size"],
            seed=settings["seed"],
            log_every_steps=1,
            max_broken_fraction=0.1,
        ),
    }
    data = DataRecord(name="", digest="", source="", window_rows=settings["window_rows"])
    if task == "finetuning":
        config = FinetuneConfig(
            augment=FinetuneAugmentConfig(**crop),
            mixup=MixupConfig(mixup=settings["mixup"], cutmix=settings["cutmix"]),
            **common,
        )
        return ClassificationJob(
            config=config,
            source=source,
            data=data,
            folder=Path(),
            validation=source,
            classes=CLASSES,
            pretrained=None,
            initial=None,
        )
    methods = {
        "mixmae": lambda: MixMAEConfig(num_images=settings["num_images"], decoder=decoder),
        "simmim": lambda: SimMIMConfig(),
        "mae": lambda: MAEConfig(decoder=decoder),
    }
    pretraining = PretrainConfig(augment=AugmentConfig(**crop), method=methods[task](), **common)
    return PretrainJob(config=pretraining, source=source, data=data, folder=Path(), heldout=source)


def record(settings: Settings, shards: Path, *, nudge: float = 0.0) -> Curve:
    """Train a run.

    Args: shards: as write_shards made them.  nudge: relative change of each initial weight, up or down by chance.
    """
    source = open_source(shards)
    job = _job(settings, source)
    torch.manual_seed(step_seed(job.loop.seed, "init"))
    model = job.build_model()
    if nudge:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + nudge * (2 * torch.randint(2, weight.shape) - 1))
    plan = Plan(chunk_sizes=source.chunk_sizes, seed=settings["order_seed"], window_rows=settings["window_rows"])
    events = _Events()
    train(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        peak_lr=job.optim.peak_lr(job.loop.batch_size),
        clip_grad_norm=job.optim.clip_grad_norm,
        step_function=job.step,
        batches=local_batches(
            source,
            plan,
            job.config.augment,
            share=job.config.share(num_workers=1),
            stop_step=job.length.total_steps,
        ),
        state=TrainState(),
        config=job.loop,
        length=job.length,
        events=events,
        device=torch.device("cpu"),
    )
    return events.curve


class _Events(Silent):
    """Keeps what the loop logs of each step."""

    def __init__(self) -> None:
        self.curve: Curve = {"grad_norm": [], "loss": []}

    def log(self, step: int, record: Mapping[str, float], broken: Sequence[Any]) -> None:
        for name, values in self.curve.items():
            values.append(record[name])


def distance(run: str, expected: Curve, found: Curve) -> float:
    """How far a curve is from the expected one, in tolerances: up to 1 they are alike.

    Args: run: its name.  found: may be longer: steps beyond the expected ones are not looked at.
    """
    tolerance = TOLERANCE_L1 if RUNS[run]["task"] == "simmim" else TOLERANCE
    largest = 0.0
    for name, values in expected.items():
        if len(found[name]) < len(values):
            return math.inf
        for value, other in zip(values, found[name], strict=False):
            difference = abs(other - value) / (tolerance[name] * abs(value))
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """The stored runs by name, each with its settings and the two lists of its curve."""
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, *, nudge: float = 0.0) -> None:
    """Train all runs and store them, sorted and with every digit."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder))
        runs = {
            name: {"settings": settings, "curve": record(settings, shards, nudge=nudge)}
            for name, settings in RUNS.items()
        }
    file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n", encoding="utf-8")


_NO_VECTORS = {"ATEN_CPU_CAPABILITY": "default"}
_PLAIN_MKL = {"MKL_CBWR": "COMPATIBLE"}
_PLAIN_ONEDNN = {"ONEDNN_MAX_CPU_ISA": "SSE41"}
_PLAIN_NUMPY = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}
_PLAIN_JPEG = {"JSIMD_FORCENONE": "1"}
_VARIANTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "the same again": ({}, []),
    "torch, AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, []),
    "torch, no vectors": (_NO_VECTORS, []),
    "MKL, SSE2": (_PLAIN_MKL, []),
    "oneDNN, SSE4.1": (_PLAIN_ONEDNN, []),
    "NumPy, no AVX2": (_PLAIN_NUMPY, []),
    "JPEG, no vectors": (_PLAIN_JPEG, []),
    "all of these": (_NO_VECTORS | _PLAIN_MKL | _PLAIN_ONEDNN | _PLAIN_NUMPY | _PLAIN_JPEG, []),
    "two threads": ({}, ["--threads", "2"]),
    "weights + 6e-8": ({}, ["--nudge", "6e-8"]),
    "weights + 3e-7": ({}, ["--nudge", "3e-7"]),
}
"""Environment and arguments of the same runs on something like another machine."""


def print_margins() -> None:
    """Print how far rounding, and each of CHANGES, takes each run from curves.json, in tolerances."""
    stored = read()
    print(f"{'in tolerances':18}", *(f"{name:>12}" for name in RUNS))

    def row(title: str, curves: Mapping[str, Curve]) -> None:
        numbers = (distance(name, stored[name]["curve"], curve) for name, curve in curves.items())
        print(f"{title:18}", *(f"{number:12.3g}" for number in numbers), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        shards, file = write_shards(Path(folder)), Path(folder) / "variant.json"
        for title, (environment, arguments) in _VARIANTS.items():
            command = [sys.executable, "-m", "tests.golden.curves", "--output", str(file), *arguments]
            subprocess.run(command, env={**os.environ, **environment}, cwd=FILE.parents[2], check=True)
            variant = read(file)
            row(title, {name: variant[name]["curve"] for name in RUNS})
        for title, change in CHANGES.items():
            row(title, {name: record({**settings, **change}, shards) for name, settings in RUNS.items()})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make tests/golden/curves.json anew.")
    parser.add_argument("--output", type=Path, default=FILE, help="file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--nudge", type=float, default=0.0, help="relative change of each initial weight")
    parser.add_argument("--margins", action="store_true", help="print what the tolerance is chosen by, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.margins:
        print_margins()
    else:
        write(arguments.output, nudge=arguments.nudge)


if __name__ == "__main__":
    main()
