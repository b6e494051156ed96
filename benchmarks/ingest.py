"""How fast images come in: ours through Ray Data to a Ray Train worker, beside the peers and the decoder's limit.

    python benchmarks/ingest.py [--seconds 20] [--images 1000] [--legs limit peer ...]

All legs run one after the other on the same cores, on the same JPEGs, which this file makes itself (photographs.py):
  limit      simplejpeg decodes whole images from memory on every core, and nothing else
  peer       DataLoader, one worker per core: Pillow, RandomResizedCrop bicubic, flip, ToTensor, Normalize (what the
             published code of MAE and MixMIM does): normalised float32
  hard_peer  DataLoader, one worker per core: simplejpeg and torch's antialiased uint8 bicubic: uint8
  ours       prepared shards (restart tiles) through Ray Data to a Train worker: uint8
  ours_normalised   the same, and the consumer makes normalised float32 of it
  plain      Parquet files as Hugging Face writes them, otherwise as ours
Rates are of the steady state: each leg warms up first, and the time to start is reported apart. A rate is in images per
second of wall time; `per_cpu_s` divides by the CPU seconds of the whole process tree instead.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/ingest.py`

from benchmarks.photographs import make_jpegs
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.order import Plan
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import Source
from mixmae.data.sources import open_source
from mixmae.data.stream_config import StreamConfig
from mixmae.data.streams import TrainStream
from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD
from mixmae.share import WorkerShare

BATCH = 128
FORMAT = "3"
"""Version of the cached files; with another one they are made again."""
_PLAIN_COPIES = 6
Leg = Literal["limit", "peer", "hard_peer", "ours", "plain"]
LEGS: tuple[Leg, ...] = ("limit", "peer", "hard_peer", "ours", "plain")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Benchmark of the ingest."""

    seconds: float = 20.0
    """Measured time of each leg; `ours` has two parts of it, uint8 and normalised."""
    warmup_s: float = 6.0
    """Time that each leg runs before it is measured."""
    images: int = 1000
    """Distinct JPEGs."""
    cache: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "mixmae_ingest")
    """Folder of the files, made once."""
    legs: tuple[Leg, ...] = LEGS
    """What to run."""
    stream: StreamConfig = field(default_factory=StreamConfig)


@dataclass
class Rate:
    """What one leg measured."""

    images_per_s: float
    per_cpu_s: float
    startup_s: float
    peak_rss_mb: float = 0.0
    object_store_mb: float = 0.0
    wait_share: float = 0.0


def make_files(options: Options) -> Path:
    """JPEG files, the same as Parquet in Hugging Face's manner, and as prepared tiles: made once."""
    folder = options.cache / f"v{FORMAT}_{options.images}"
    if (folder / "done").exists():
        return folder
    for name in ("files", "plain"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jpegs = list(make_jpegs(options.images))
    for number, data in enumerate(jpegs):
        (folder / "files" / f"{number:05d}.jpg").write_bytes(data)
    images = [{"bytes": data, "path": f"{number:05d}.jpg"} for number, data in enumerate(jpegs)]
    table = pa.table({"image": images, "label": [number % 10 for number in range(len(jpegs))]})
    # Several copies: a decoding process would keep one in memory, which it cannot do with a real set.
    for number in range(_PLAIN_COPIES):
        pq.write_table(table, folder / "plain" / f"train-{number:05d}.parquet", row_group_size=100)
    make_shards(folder / "files", folder / "prepared", tiles=True, report=lambda line: None)
    (folder / "done").touch()
    return folder


class Meter:
    """CPU seconds and memory of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def processes(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_s(self) -> float:
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def memory_mb(self) -> tuple[float, float]:
        """Memory of all processes, pages that several of them share counted once: their own, and shared memory."""
        own = store = 0.0
        for process in self.processes():
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
            except OSError:
                continue
            shares = {line.split(":")[0]: float(line.split()[1]) / 1e3 for line in lines}
            own += shares["Pss"] - shares["Pss_Shmem"]
            store += shares["Pss_Shmem"]
        return own, store


def measure(arrivals: Iterator[int], started: float, seconds: float, warmup_s: float, meter: Meter) -> Rate:
    """Consume image counts: first for warmup_s, then for so many measured seconds.

    Args: arrivals: images of each batch, as they come.  started: time.time() when the leg began.
    """
    waited = 0.0

    def take() -> int:
        nonlocal waited
        asked = time.perf_counter()
        count = next(arrivals)
        waited += time.perf_counter() - asked
        return count

    take()
    startup_s = time.time() - started
    warm = time.perf_counter() + warmup_s
    while time.perf_counter() < warm:
        take()
    memory = meter.memory_mb()
    cpu, begin, count, waited = meter.cpu_s(), time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - begin) < seconds:
        count += take()
    cpu = meter.cpu_s() - cpu
    memory = tuple(map(max, memory, meter.memory_mb()))  # type: ignore[assignment]
    return Rate(count / elapsed, count / cpu, startup_s, *memory, waited / elapsed)


def _decode_forever(files: list[Path], count: Any) -> None:
    jpegs = [path.read_bytes() for path in files]
    while True:
        for data in jpegs:
            simplejpeg.decode_jpeg(data)
            count.value += 1


def run_limit(options: Options, folder: Path) -> Rate:
    """Whole images decoded from memory, one process per core."""
    context = multiprocessing.get_context("fork")
    files = sorted((folder / "files").iterdir())
    counts = [context.Value("q", 0, lock=False) for _ in range(_cores())]
    started = time.time()
    workers = [context.Process(target=_decode_forever, args=(files[i:] + files[:i], c)) for i, c in enumerate(counts)]
    for worker in workers:
        worker.start()

    def arrivals() -> Iterator[int]:
        before = 0
        while True:
            time.sleep(0.02)
            now = sum(count.value for count in counts)
            yield now - before
            before = now

    try:
        return measure(arrivals(), started, options.seconds, options.warmup_s, Meter(os.getpid()))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


class Files(Dataset):
    """Image files and what is done to each; the peers' own kind of dataset."""

    def __init__(self, folder: Path, transform: Callable[[Path], torch.Tensor]) -> None:
        self.files = sorted(folder.iterdir())
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.files[index]), 0


class Forever(Sampler):
    """Shuffled epochs without a pause between them, which would slow the peers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.length).tolist()


class PillowRecipe:
    """The transform of the published training code of MAE and of MixMIM."""

    def __init__(self) -> None:
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __call__(self, path: Path) -> torch.Tensor:
        with path.open("rb") as stream:
            return self.transform(Image.open(stream).convert("RGB"))


class FastRecipe:
    """The same crops with simplejpeg and torch's antialiased uint8 bicubic."""

    def __call__(self, path: Path) -> torch.Tensor:
        pixels = simplejpeg.decode_jpeg(path.read_bytes())
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        crop = torch.from_numpy(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        resized = torch.nn.functional.interpolate(
            crop.permute(2, 0, 1)[None], (224, 224), mode="bicubic", antialias=True
        )[0]
        return resized.flip(-1) if torch.rand(()) < 0.5 else resized


def run_loader(options: Options, folder: Path, recipe: Callable[[Path], torch.Tensor]) -> Rate:
    """A DataLoader with one worker per core."""
    dataset = Files(folder / "files", recipe)
    started = time.time()
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=Forever(len(dataset)),
        num_workers=_cores(),
        prefetch_factor=4,
        persistent_workers=True,
        pin_memory=False,
        drop_last=True,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    arrivals = (len(images) for images, _ in batches)
    try:
        return measure(arrivals, started, options.seconds, options.warmup_s, Meter(os.getpid()))
    finally:
        del batches, arrivals, loader


def _consume(config: dict[str, Any]) -> dict[str, Any]:
    """The Train worker: takes batches, and for a second part makes float32 of them."""
    options: Options = config["options"]
    source: Source = config["source"]
    torch.set_num_threads(1)
    plan = Plan(chunk_sizes=source.chunk_sizes)
    stream = TrainStream(
        source,
        plan,
        AugmentConfig(),
        share=WorkerShare(batch_size=BATCH),
        stop_step=10**6,
        config=options.stream,
    )
    scale = (1 / (255 * torch.tensor(IMAGENET_STD))).view(3, 1, 1)
    shift = (torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)).view(3, 1, 1)
    normalised = torch.empty(BATCH, 3, 224, 224)
    batches = iter(stream)
    meter = Meter(config["pid"])
    arrivals = (len(batch.images) for batch in batches)
    results = {"uint8": asdict(measure(arrivals, config["started"], options.seconds, options.warmup_s, meter))}

    def normalise() -> Iterator[int]:
        for batch in batches:
            torch.mul(batch.images, scale, out=normalised).sub_(shift)
            yield len(batch.images)

    if config["normalised"]:
        results["float32"] = asdict(measure(normalise(), config["started"], options.seconds, 2.0, meter))
    stream.close()
    return results


def run_ours(options: Options, source: Source, *, normalised: bool) -> dict[str, Rate]:
    """Ray, a Train worker and the stream, started as pipelines/pretrain.py starts them."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    started = time.time()
    ray.init(
        num_cpus=_cores() + 1, address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            _consume,
            train_loop_config={
                "options": options,
                "source": source,
                "pid": os.getpid(),
                "started": started,
                "normalised": normalised,
            },
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                storage_path=storage, logging_config=ray.train.LoggingConfig(log_level="ERROR")
            ),
        )
        try:
            found = trainer.fit().return_value or {}
        finally:
            ray.shutdown()
    return {name: Rate(**values) for name, values in found.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    pairs = {
        "ours_per_peer": ("ours", "peer"),
        "ours_per_hard_peer": ("ours", "hard_peer"),
        "ours_per_limit": ("ours", "limit"),
        "ours_normalised_per_peer": ("ours_normalised", "peer"),
        "plain_per_peer": ("plain", "peer"),
        "plain_per_limit": ("plain", "limit"),
    }
    return {name: round(rates[a] / rates[b], 3) for name, (a, b) in pairs.items() if a in rates and b in rates}


def run(options: Options) -> dict[str, Any]:
    """All legs, and the report."""
    folder = make_files(options)
    sizes = [path.stat().st_size for path in (folder / "files").iterdir()]
    print(
        f"{platform.processor() or platform.machine()}, {_cores()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{len(sizes)} JPEGs of {np.mean(sizes) / 1e3:.0f} KB",
        flush=True,
    )
    rates: dict[str, Rate] = {}

    def add(name: str, rate: Rate) -> None:
        rates[name] = rate
        print(
            f"{name:16s} {rate.images_per_s:7.0f} images/s  {rate.per_cpu_s:6.0f} per CPU s  started in "
            f"{rate.startup_s:4.1f} s  memory {rate.peak_rss_mb:5.0f} MB  object store {rate.object_store_mb:4.0f} MB",
            flush=True,
        )

    for leg in options.legs:
        if leg == "limit":
            add(leg, run_limit(options, folder))
        elif leg == "peer":
            add(leg, run_loader(options, folder, PillowRecipe()))
        elif leg == "hard_peer":
            add(leg, run_loader(options, folder, FastRecipe()))
        elif leg == "ours":
            measured = run_ours(options, open_source(folder / "prepared"), normalised=True)
            add("ours", measured["uint8"])
            add("ours_normalised", measured["float32"])
        else:
            add("plain", run_ours(options, open_source(folder / "plain"), normalised=False)["uint8"])
    return {
        **{name: round(rate.images_per_s, 1) for name, rate in rates.items()},
        **_ratios({name: rate.images_per_s for name, rate in rates.items()}),
        # Ratios of CPU seconds, for a machine that runs other programs too.
        "cpu_ratios": _ratios({name: rate.per_cpu_s for name, rate in rates.items()}),
        "per_cpu_s": {name: round(rate.per_cpu_s, 1) for name, rate in rates.items()},
        "startup_s": {name: round(rate.startup_s, 1) for name, rate in rates.items()},
        "peak_rss_mb": {name: round(rate.peak_rss_mb) for name, rate in rates.items()},
        "object_store_mb": {name: round(rate.object_store_mb) for name, rate in rates.items() if rate.object_store_mb},
        "cores": _cores(),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    # By its name, so that Ray's workers find the classes in a module and not in this script.
    from benchmarks import ingest

    print(json.dumps(ingest.run(tyro.cli(ingest.Options))))
