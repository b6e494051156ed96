"""Say what a run of a recipe will cost before it is started: memory, time, cores to decode, bytes, disk.

    python pipelines/plan.py RECIPE [--gpus 8 --card H100] [--data SOURCE] [--output FOLDER] [any field of the recipe]

On a card, memory is counted exactly and time is a bound that no run is below (mixmae/cost.py): no GPU is needed. With
--gpus 0 the run is on this machine's cores: a few of its steps are made here, on all workers at once, and of its images
read. With --output the plan lies in the run's folder, and the run says at its end how it compared.

What a detector computes depends on its images: it is counted with as many regions as its heads ever learn from.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mixmae.cost import CARDS, GIB, USABLE_MEMORY, StepCost, largest_micro_batch
from mixmae.data.annotated import object_classes
from mixmae.data.prepare import open_for_training
from mixmae.data.source import Source
from mixmae.data.truth import with_maps
from mixmae.flops import count_parameters
from mixmae.jobs.config import DenseConfig, DetectConfig, FinetuneConfig, PretrainConfig, RunConfig, SegmentConfig
from mixmae.jobs.estimate import (
    Estimate,
    build_on_meta,
    checkpoint_bytes,
    cost_of,
    decode_rate,
    forward_macs,
    measure_steps,
    micro_batch_unit,
)
from mixmae.jobs.full_detector import NUM_OBJECTS, num_regions
from mixmae.machine import usable_cores
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.share import WorkerShare
from mixmae.training.run_folder import PLAN_FILE
from mixmae.writing import write_json
from pipelines.command import recipe_command
from pipelines.recipes import DETECT_RECIPES, FINETUNE_RECIPES, PRETRAIN_RECIPES, SEGMENT_RECIPES
from pipelines.recipes.segment import ADE20K_IMAGES

Config = PretrainConfig | FinetuneConfig | SegmentConfig | DetectConfig


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What is planned with where --data is not given."""

    name: str
    num_images: int
    gigabytes: float
    """Of its files."""
    num_classes: int
    decode_rate: float
    """Images per second and core that are decoded and transformed as the recipes do it, on an AMD EPYC
    (docs/benchmarks/ingest_cpu2_202611.md)."""


IMAGENET = TrainingSet(name="ImageNet-1K", num_images=1_281_167, gigabytes=140, num_classes=1000, decode_rate=999)
"""Rate: JPEGs stored in restart tiles, crops of 224 px; without the tiles about two thirds of it."""
ADE20K = TrainingSet(name="ADE20K", num_images=ADE20K_IMAGES, gigabytes=1, num_classes=150, decode_rate=69)
"""SceneParse150. Bytes: its archive, ADEChallengeData2016.zip, with masks and validation images."""
COCO = TrainingSet(name="COCO 2017", num_images=118_287, gigabytes=19, num_classes=80, decode_rate=38)
"""Bytes: the archive train2017.zip, of 18 GiB on the page of downloads of cocodataset.org."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: the machine, the images, the recipe."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The recipe's fields; any of them can be changed."""
    gpus: int = 1
    """GPUs of the run, one worker each; 0: on the cores of this machine."""
    card: Literal["H200", "H100", "A100", "A100-40GB", "L40S", "L4", "RTX4090"] = "H100"
    """Kind of the GPUs."""
    workers: int = 0
    """Without GPUs, training processes. 0: one per core, or fewer where a batch has fewer parts."""
    data: str | None = None
    """Training images, as for the run: their number, and how fast they are read here. Default: as many as ImageNet-1K
    has, for segmentation ADE20K and for detection COCO 2017; without GPUs, the built-in moths or scenes."""
    num_classes: int | None = None
    """Of finetuning. Default: 1000; for segmentation and detection, those of --data, else 150 and 80."""
    decode_rate: float | None = None
    """Images per second that a core decodes. Default: measured on --data, else 999 for images like ImageNet's, 69 for
    ADE20K's and 38 for COCO's (docs/benchmarks)."""
    reach: float = 0.5
    """Share of the card's roofline that the run reaches. The kernels of Swin-B, compiled, reached 0.48 on an H200
    (docs/benchmarks/step_h200_202611.md); whole runs and other cards are not yet measured."""
    output: Path | None = None
    """Folder of the run, where plan.json is left for it."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.workers < 0:
            raise ValueError("--gpus and --workers are numbers of processes: give 0 or more.")
        if not 0 < self.reach <= 1:
            raise ValueError(f"--reach is {self.reach}: it is a share, above 0 and at most 1.")
        if self.decode_rate is not None and not self.decode_rate > 0:
            raise ValueError(f"--decode-rate is {self.decode_rate}: it must be above 0.")


def plan(arguments: Arguments, recipe: str) -> int:
    """Print the plan.   Returns: the exit status: 1 if a step does not fit the card's memory."""
    config, usual = arguments.config, _usual_set(arguments.config)
    source = None
    if arguments.data is not None or not arguments.gpus:
        place = (arguments.output or Path("runs", recipe)).parent / "data"
        built_in = "scenes" if isinstance(config, DenseConfig) else None
        source, _ = open_for_training(arguments.data or built_in, place, 0)
    num_classes = arguments.num_classes or _num_classes(config, source) or usual.num_classes
    arguments = replace(arguments, num_classes=num_classes)
    num_images = usual.num_images if source is None else source.num_rows
    length = config.length(num_images)
    model, gmacs = build_on_meta(config, num_classes), forward_macs(config, num_classes) / 1e9
    print(
        f"model        {count_parameters(model) / 1e6:.1f} M parameters, {gmacs:.2f} GMACs per image forward, at "
        f"{config.augment.image_size} px; a step is about three forwards"
    )
    if isinstance(config, DetectConfig):
        boxes, masks = num_regions(config.detector)
        print(
            f"             counted with {NUM_OBJECTS} objects per image, and all {boxes} regions for boxes and {masks} "
            "for masks that the heads learn from at most: exact for these, and a bound where an image gives fewer. "
            "Suppression of proposals is not counted"
        )
    name = usual.name if source is None else source.name
    print(
        f"images       {num_images} ({name}), {length.total_steps} steps of {config.loop.batch_size}, "
        f"{length.total_steps / length.steps_per_epoch:.0f} epochs"
    )
    if arguments.gpus:
        estimate, fits = _on_cards(arguments)
    else:
        estimate, fits = _on_cores(arguments, source), True
    hours = length.total_steps * config.loop.batch_size / estimate.images_per_s / 3600
    each = f" = {hours * arguments.gpus:.0f} GPU-hours" if arguments.gpus else ""
    print(f"length       {_hours(hours)} of training{each}; evaluations and checkpoints come on top")
    if arguments.gpus:
        _feed(arguments, source, estimate)
    print(f"checkpoint   {checkpoint_bytes(model) / 1e9:.2f} GB: weights and two moments; the newest three are kept")
    if arguments.gpus and fits:
        _cheaper(arguments, estimate)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output / PLAN_FILE, {"recipe": recipe, "hours": hours, **asdict(estimate)})
        print(f"written      {arguments.output / PLAN_FILE}")
    return 0 if fits else 1


def _usual_set(config: RunConfig) -> TrainingSet:
    """What the recipes of this kind are for."""
    return ADE20K if isinstance(config, SegmentConfig) else COCO if isinstance(config, DetectConfig) else IMAGENET


def _num_classes(config: RunConfig, source: Source | None) -> int | None:
    """Classes of a source's pixels or objects; None where it does not matter or is not known.   Raises: DataError."""
    if source is None or not isinstance(config, DenseConfig):
        return None
    known = with_maps(source).dense if isinstance(config, SegmentConfig) else object_classes(source)
    assert known is not None
    return len((known.pixels if isinstance(config, SegmentConfig) else known.objects) or ())


def _on_cards(arguments: Arguments) -> tuple[Estimate, bool]:
    """The plan on GPUs, and whether a step fits."""
    config, card = arguments.config, CARDS[arguments.card]
    share = _largest_share(config, arguments.gpus)
    micro_batch = max(share.micro_batches)
    cost = _cost(arguments, config, micro_batch)
    usable = USABLE_MEMORY * card.memory_gib * GIB
    print(
        f"per step     {arguments.gpus} x {arguments.card}, {share.accumulation} micro-batch"
        f"{'es' * (share.accumulation > 1)} of {micro_batch} images each, {config.loop.precision}, "
        f"{_tflop(cost)} per image"
    )
    _print_memory(cost, f"{arguments.card} has {card.memory_gib:.0f} GiB, of which {usable / GIB:.0f} are planned with")
    fits = cost.peak <= usable
    if fits:
        print(f"             a micro-batch of up to {_largest(arguments, share.images)} of the worker's "
              f"{share.images} images fits")  # fmt: skip
    else:
        largest = _largest(arguments, share.images)
        size = _accepted(arguments, largest)
        remedy = f"--loop.micro-batch-size {size} fits" if size else "not even the smallest fits: take a larger card"
        print(f"             this does NOT fit: {remedy}")
    assert cost.seconds is not None
    assert cost.product_seconds is not None
    bound = config.loop.batch_size / (share.images / micro_batch * cost.seconds)
    print(
        f"speed        at most {bound:.0f} images/s: the roofline of {arguments.card}, "
        f"{cost.product_seconds / cost.seconds:.0%} of it matrix products. "
        f"Reckoned with: {arguments.reach:.0%} of that, an assumption (--reach)"
    )
    return Estimate(images_per_s=arguments.reach * bound, bound=bound, memory=cost.peak, workers=arguments.gpus), fits


def _largest_share(config: RunConfig, num_workers: int) -> WorkerShare:
    """The share of the worker that has the most images."""
    return config.share(num_workers=num_workers, rank=num_workers - 1)


def _largest(arguments: Arguments, images: int) -> int:
    """The largest micro-batch of a worker's images that fits the card; 0 if none does."""
    config, card = arguments.config, CARDS[arguments.card]
    return largest_micro_batch(
        lambda images: _cost(arguments, config, images),
        unit=micro_batch_unit(config),
        limit=images,
        memory=USABLE_MEMORY * card.memory_gib * GIB,
    )


def _accepted(arguments: Arguments, largest: int) -> int:
    """The largest micro-batch, up to `largest`, that the run can be cut into; 0 if there is none."""
    config, unit = arguments.config, micro_batch_unit(arguments.config)
    for size in range(largest, 0, -unit):
        with contextlib.suppress(ValueError):
            _largest_share(replace(config, loop=replace(config.loop, micro_batch_size=size)), arguments.gpus)
            return size
    return 0


def _cost(arguments: Arguments, config: RunConfig, images: int, workers: int = 0) -> StepCost:
    """The cost of a micro-batch on the card, or on this machine's CPU.   Args: workers: 0: one for each GPU."""
    assert arguments.num_classes is not None
    card = CARDS[arguments.card] if arguments.gpus else None
    return cost_of(config, images, arguments.num_classes, card=card, workers=workers or arguments.gpus)


def _tflop(cost: StepCost) -> str:
    """What a step's products are, per image."""
    return f"{cost.flops / cost.images / 1e12:.3g} TFLOP"


def _print_memory(cost: StepCost, limit: str) -> None:
    """What a step holds, and what of it each part keeps."""
    kept = sum(cost.activations.values())
    print(
        f"memory       {cost.peak / GIB:.2f} GiB per worker ({limit}): weights {cost.weights / GIB:.2f}, gradients "
        f"{cost.gradients / GIB:.2f}, optimiser {cost.optimizer / GIB:.2f}, activations {kept / GIB:.2f}"
    )
    parts = sorted(cost.activations.items(), key=lambda part: -part[1])[:5]
    print("             activations: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts))


def _on_cores(arguments: Arguments, source: Source | None) -> Estimate:
    """The plan on this machine's cores, from steps made here."""
    assert source is not None
    config, cores = arguments.config, usable_cores()
    num_blocks = config.share(num_workers=1).num_blocks
    workers = arguments.workers or -(-num_blocks // -(-num_blocks // cores))  # as a run chooses
    share = _largest_share(config, workers)
    cost = _cost(arguments, config, max(share.micro_batches), workers)
    assert arguments.num_classes is not None
    measured = measure_steps(config, share, arguments.num_classes)
    rate = arguments.decode_rate or decode_rate(config, source)
    # Decoding takes its time from the same cores.
    step_s = measured.step_s + config.loop.batch_size / rate / cores
    print(f"per step     {workers} processes of {max(1, cores // workers)} threads, {share.images} images each")
    base, taken = measured.base / GIB, measured.peak / GIB
    _print_memory(cost, f"beside {base:.2f} GiB of the process and its libraries; here it took {taken:.2f}")
    images_per_s = config.loop.batch_size / step_s
    print(
        f"speed        {images_per_s:.3g} images/s: {measured.step_s:.3f} s a step here, and {rate:.0f} images/s "
        f"decoded per core, by the same {cores} cores"
    )
    return Estimate(images_per_s=images_per_s, bound=None, memory=cost.peak, workers=workers)


def _feed(arguments: Arguments, source: Source | None, estimate: Estimate) -> None:
    """Cores and bytes that the images take."""
    usual = _usual_set(arguments.config)
    rate, origin = arguments.decode_rate, ""
    if rate is None and source is not None:
        rate, origin = decode_rate(arguments.config, source), ", measured here"
    elif rate is None:
        rate, origin = usual.decode_rate, " (docs/benchmarks; measure yours: --data, or --decode-rate)"
    print(f"decoding     {estimate.images_per_s / rate:.1f} cores at {rate:.0f} images/s each{origin}")
    if source is None:
        print(f"reading      {usual.gigabytes:.0f} GB per epoch")


def _cheaper(arguments: Arguments, estimate: Estimate) -> None:
    """What would make the run cheaper, by the same accounting."""
    config = arguments.config
    variants: dict[str, Config] = {}
    if config.loop.precision == "float32":
        variants["--loop.precision bfloat16"] = replace(config, loop=replace(config.loop, precision="bfloat16"))
    if isinstance(config, PretrainConfig) and isinstance(config.method, MixMAEConfig):
        method = config.method
        if method.pairing == "all" and method.images_mixed > 1:
            once = replace(config, method=replace(method, pairing="once"))
            variants[f"--method.pairing once, with 1/{method.num_images} of the reconstructions"] = once
    for flag, variant in variants.items():
        share = _largest_share(variant, arguments.gpus)
        micro_batch = max(share.micro_batches)
        cost = _cost(arguments, variant, micro_batch)
        assert cost.seconds is not None
        assert estimate.bound is not None
        bound = config.loop.batch_size / (share.images / micro_batch * cost.seconds)
        print(f"cheaper      {flag}: {bound / estimate.bound:.1f} x the images/s, {cost.peak / GIB:.1f} GiB")


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    recipes = {**PRETRAIN_RECIPES, **FINETUNE_RECIPES, **SEGMENT_RECIPES, **DETECT_RECIPES}
    return recipe_command(plan, Arguments, argv, program="plan.py", about=__doc__, recipes=recipes)


if __name__ == "__main__":
    sys.exit(main())
