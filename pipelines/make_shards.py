"""Turn any collection of images, or the built-in shapes, into the Parquet shards that training reads fastest.

    python pipelines/make_shards.py SOURCE OUTPUT

SOURCE is whatever open_source takes (docs/data.md): folders of images, Parquet, tars, file lists, globs, s3:// and
other URIs. The word `shapes` draws the built-in set. Images keep their pixels: baseline JPEGs become restart-tile JPEGs
(lossless, a crop decodes only what it shows) if jpegtran is installed, everything else is stored byte for byte. Rows
are shuffled. Without a validation split about 1 % of the images (8 to 1000) are held out as one.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, decode_rgb, image_size
from mixmae.data.images.summary import Summary
from mixmae.data.order import Draw, Plan, permutation
from mixmae.data.shards import shapes
from mixmae.data.shards.write import (
    MANIFEST_FORMAT,
    ShardFile,
    StoredImage,
    describe_shard,
    read_json,
    shard_name,
    shard_schema,
    write_json,
    write_manifest,
    write_shard,
)
from mixmae.data.source import DataError, Sample, Source, read_rows
from mixmae.data.sources.folders import FilesSource
from mixmae.data.sources.joined import JoinedSource
from mixmae.data.sources.open import MANIFEST_NAME, layout_of, list_splits, open_source
from mixmae.data.sources.parquet import ParquetSource
from mixmae.data.sources.shard_index import INDEX_SUFFIX
from mixmae.data.sources.storage import plain_place, writable_folder

SHAPES = "shapes"
MIN_IMAGES = 8
RESIZED_QUALITY = 95
"""JPEG quality of images that --resize-longer-side shrinks; colour at half resolution (4:2:0), as cameras store it."""
SUMMARY_IMAGES = 64
"""Images of each shard that are decoded for the manifest's mean and standard deviation: its first ones, any ones."""

_PROGRESS_NAME = ".making.json"


@dataclass(frozen=True)
class MadeShards:
    """What make_shards did."""

    folder: Path
    rows: dict[str, int]
    """Images per split."""
    num_bytes: int
    class_names: tuple[str, ...] | None
    digest: str
    num_broken: int
    """Rows known to be no image, or a damaged one; the manifest names them, and a run that meets them its ledger."""
    made: bool
    """False if the shards were there already and up to date."""


@dataclass(frozen=True)
class _Job:
    """One shard to write; travels to the workers of a cluster."""

    split: str
    number: int
    count: int
    images: Callable[[], list[StoredImage]]

    @property
    def file_name(self) -> str:
        return shard_name(self.split, self.number, self.count)


@dataclass(frozen=True)
class _Written:
    """One shard that is there."""

    shard: ShardFile
    summary: Summary


@dataclass(frozen=True)
class _Work:
    """All that a source asks for."""

    jobs: list[_Job]
    schema: pa.Schema
    class_names: tuple[str, ...] | None
    fingerprint: str
    origin: dict[str, Any]
    files: frozenset[str] = frozenset()
    """Local Parquet files that are read."""


def make_shards(
    source: str | Path,
    output: str | Path,
    *,
    shard_mb: float = 128.0,
    resize_longer_side: int | None = None,
    tiles: bool | None = None,
    seed: int = 0,
    workers: int = 0,
    ray_address: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> MadeShards:
    """Write a source as shards with a manifest; if they are there already and up to date, do nothing.

    An interrupted run is continued: finished shards are kept if the source has not changed.

    Args:   source: what open_source takes, or "shapes".  output: local folder to write, made if missing.
            shard_mb: aim for the size of a shard in megabytes.
            resize_longer_side: shrink images whose longer side is above so many pixels; others stay as they are.
            tiles: store restart-tile JPEGs; None does it if the tool is there.
            seed: of the shuffle and the held-out choice.  workers: shards written at once; 0 means one per core.
            ray_address: write on this Ray cluster ("local" starts one here); None uses threads of this process.
            overwrite: replace shards of another source.  say: where progress lines go.
    Raises: DataError if the source has no usable image or the output may not be written.
    """
    started = time.monotonic()
    if shard_mb <= 0:
        raise DataError(f"shard_mb is {shard_mb}: give the aim for a shard's size in megabytes, such as 128")
    if resize_longer_side is not None and resize_longer_side < 1:
        raise DataError(f"resize_longer_side is {resize_longer_side}: give a length in pixels, such as 512")
    if workers < 0:
        raise DataError(f"workers is {workers}: give how many shards are written at once, or 0 for one a core")
    folder = writable_folder(output)
    if str(source) == SHAPES:
        work = _plan_shapes(seed)
    else:
        work = _plan_source(str(source), shard_mb, resize_longer_side, tiles, seed)
    finished = read_json(folder / MANIFEST_NAME)
    if finished is not None and finished.get("fingerprint") == work.fingerprint and _is_whole(folder, finished):
        say(f"{folder} already holds these shards, up to date: nothing to do")
        return _result(folder, finished, made=False)
    _prepare_output(folder, work, overwrite)

    if str(source) != SHAPES and tiles is not False and _tiler() is None:
        say(
            "note: jpegtran is not installed, so JPEGs are stored as they are: training reads them, but decodes each "
            "whole instead of the crop alone, at about two thirds of the speed. To install it: apt-get install "
            "libjpeg-turbo-progs (Debian, Ubuntu), brew install jpeg-turbo (macOS); then make the shards again"
        )
    write_json(folder / _PROGRESS_NAME, {"fingerprint": work.fingerprint})

    done: dict[str, _Written] = {}
    results = _write_on_ray if ray_address else _write_in_threads
    for job, written in results(work, folder, workers, ray_address):
        done[job.file_name] = written
        shard, elapsed = written.shard, time.monotonic() - started
        left = elapsed / len(done) * (len(work.jobs) - len(done))
        say(
            f"{len(done)}/{len(work.jobs)} {shard.name}: {shard.rows} images, {shard.bytes / 1e6:.1f} MB"
            + (f", about {left:.0f} s left" if left >= 10 else "")
        )

    splits: dict[str, list[ShardFile]] = {}
    summaries: dict[str, Summary] = {}
    for job in work.jobs:
        written = done[job.file_name]
        splits.setdefault(job.split, []).append(written.shard)
        summaries.setdefault(job.split, Summary()).merge(written.summary)
    write_manifest(
        folder,
        splits=splits,
        class_names=work.class_names,
        summaries={split: summary.as_dict(work.class_names) for split, summary in summaries.items()},
        fingerprint=work.fingerprint,
        origin=work.origin,
    )
    (folder / _PROGRESS_NAME).unlink(missing_ok=True)
    result = _result(folder, read_json(folder / MANIFEST_NAME) or {}, made=True)
    broken = sorted(record for summary in summaries.values() for record in summary.broken)
    for where, reason in broken[:5]:
        say(f"no usable image: {where}: {reason}")
    if broken:
        say(
            f"{len(broken)} files are empty, unreadable or damaged: training shows others in their place, counts them "
            f"and names them; {MANIFEST_NAME} lists these"
        )
    counts = " + ".join(f"{rows} {split}" for split, rows in result.rows.items())
    classes = f" of {len(result.class_names)} classes" if result.class_names else ""
    say(f"{folder}: {counts} images{classes}, {result.num_bytes / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return result


def default_shapes(output: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """The folder of the embedded default set, made if it is not there yet: 4,000 + 1,000 images of 20 classes."""
    return make_shards(SHAPES, output, say=say).folder


def is_image_folder(path: str | Path) -> bool:
    """Whether a path is a local folder of image files, which training reads faster after make_shards.

    Raises: DataError if it is a folder without any image.
    """
    return Path(path).expanduser().is_dir() and layout_of(path) == "files"


def _write_in_threads(
    work: _Work, folder: Path, workers: int, ray_address: str | None
) -> Iterator[tuple[_Job, _Written]]:
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = {pool.submit(_write, job, folder, work.schema): job for job in work.jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_on_ray(work: _Work, folder: Path, workers: int, ray_address: str | None) -> Iterator[tuple[_Job, _Written]]:
    """One task a shard. The output folder, and a local source, must be on a disk that all nodes share."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=ray_address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise DataError(
                f"no Ray cluster answers at {ray_address} ({str(error).splitlines()[0]}): start one with `ray start "
                f"--head`, correct --ray-address, or leave it out to use this machine's cores alone"
            ) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_write)
        waiting = list(reversed(work.jobs))
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, _Job] = {}
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.pop()
                running[task.remote(job, folder, work.schema)] = job
            ready, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ready[0]), ray.get(ready[0])
    finally:
        if ours:
            ray.shutdown()


def _write(job: _Job, folder: Path, schema: pa.Schema) -> _Written:
    """Write a shard, or take the one that an interrupted run has left."""
    path = folder / job.file_name
    if path.exists():
        shard = describe_shard(path)
        table = pq.read_table(path, columns=[name for name in ("image", "label") if name in schema.names])
        cells = table.column("image").to_pylist()
        labels = table.column("label").to_pylist() if "label" in schema.names else [-1] * len(cells)
        images = [StoredImage(cell["bytes"], cell["path"], label) for cell, label in zip(cells, labels, strict=True)]
    else:
        images = job.images()
        shard = write_shard(path, images, schema)
    summary = Summary()
    for row, image in enumerate(images):
        summary.add(image.data, image.label, f"{path.name}#{row} / {image.path}", decode=row < SUMMARY_IMAGES)
    return _Written(shard, summary)


def _plan_shapes(seed: int) -> _Work:
    rows_per_shard = 1000  # five shards, so that several cores draw at once
    counts = {"train": shapes.NUM_TRAIN // rows_per_shard, "validation": shapes.NUM_VALIDATION // rows_per_shard}
    starts = {"train": 0, "validation": shapes.NUM_TRAIN}
    jobs = []
    for split, count in counts.items():
        for number in range(count):
            start = starts[split] + number * rows_per_shard
            jobs.append(_Job(split, number, count, partial(_shapes, seed, start, start + rows_per_shard)))
    origin = {"source": SHAPES, "generator_version": shapes.GENERATOR_VERSION, "seed": seed}
    schema = shard_schema(shapes.CLASS_NAMES, with_masks=True)
    return _Work(jobs, schema, shapes.CLASS_NAMES, _fingerprint(origin, []), origin)


def _shapes(seed: int, start: int, stop: int) -> list[StoredImage]:
    images = []
    for index, image in enumerate(shapes.shape_images(seed, start, stop), start):
        name = f"{shapes.CLASS_NAMES[image.label]}/{index:06d}.jpg"
        images.append(StoredImage(image.jpeg, name, image.label, image.box, image.mask_png))
    return images


def _plan_source(place: str, shard_mb: float, longer_side: int | None, tiles: bool | None, seed: int) -> _Work:
    if tiles and _tiler() is None:
        raise DataError(
            "restart tiles need jpegtran, which is not installed: apt-get install libjpeg-turbo-progs (Debian, "
            "Ubuntu), brew install jpeg-turbo (macOS), or leave --tiles out to store JPEGs as they are"
        )
    sources = {split: open_source(place, split) for split in list_splits(place)}
    problems = [source.problems for source in sources.values() if isinstance(source, FilesSource)]
    total = sum(source.num_rows for source in sources.values()) - sum(map(len, problems))
    if "train" not in sources:
        raise DataError(f"{place} has no train split, only {', '.join(sources)}: name a folder or file for training")
    train = sources["train"]
    orders = {
        split: (source, _shuffled(source, shard_mb, seed, number))
        for number, (split, source) in enumerate(sorted(sources.items()))
    }
    if total < MIN_IMAGES:
        raise DataError(f"only {total} images in {place}: training needs at least {MIN_IMAGES}")
    if "validation" not in orders:
        source, rows = orders["train"]
        count = min(max(round(len(rows) / 100), 8), 1000, len(rows) // 4)
        chosen = np.zeros(source.num_rows, dtype=bool)
        chosen[rows[permutation(len(rows), Draw.HOLDOUT, seed)[:count]]] = True
        held = rows[chosen[rows]]
        if isinstance(source, JoinedSource):  # no copy of a held-out image is for training, and it is held out once
            stored = source.stored_rows
            chosen = np.isin(stored, stored[held])
            held = held[np.sort(np.unique(stored[held], return_index=True)[1])]
        orders["validation"] = source, held
        orders["train"] = source, rows[~chosen[rows]]

    jobs = []
    for split in sorted(orders):
        source, rows = orders[split]
        split_bytes = source.num_bytes * len(rows) / source.num_rows
        count = max(1, min(len(rows), round(split_bytes / (shard_mb * 1e6))))
        for number in range(count):
            part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
            jobs.append(_Job(split, number, count, partial(_stored, source, part, longer_side, tiles is not False)))
    class_names = train.class_names
    schema = shard_schema(class_names, labelled=any(source.has_labels for source in sources.values()))
    # Only what changes the result: the same photos elsewhere are the same set.
    origin = {
        "source": plain_place(place),
        "seed": seed,
        "shard_mb": shard_mb,
        "resize_longer_side": longer_side,
        "tiles": tiles,
    }
    facts = [
        f"{split} {source.digest} {source.stamp if isinstance(source, FilesSource) else ''}"
        for split, source in sorted(sources.items())
    ]
    files = frozenset(file for source in sources.values() for file in _parquet_files(source))
    return _Work(jobs, schema, class_names, _fingerprint(origin, facts), origin, files)


def _parquet_files(source: Source) -> Iterator[str]:
    if isinstance(source, ParquetSource):
        yield from source.files
    elif isinstance(source, JoinedSource):
        for part in source.parts:
            yield from _parquet_files(part)


def _shuffled(source: Source, shard_mb: float, seed: int, number: int) -> Int64Array:
    """All rows in a shuffled order that the source can be read in without reading its chunks over and over.

    Where single rows can be read, any order will do. Elsewhere rows are shuffled inside windows of permuted chunks,
    about a shard each, so that a chunk is read once or twice.
    """
    if source.exact_reads:
        return permutation(source.num_rows, Draw.HOLDOUT, seed, number)
    window = max(1, int(shard_mb * 1e6 * source.num_rows / max(1, source.num_bytes)))
    return Plan(chunk_sizes=source.chunk_sizes, seed=seed, window_rows=window).rows_at(0, source.num_rows)[0]


def _stored(source: Source, rows: Int64Array, longer_side: int | None, tiles: bool) -> list[StoredImage]:
    """These rows as they go into a shard; one without bytes stays a row, so that it is counted."""
    retile = _tiler() if tiles else None
    images = []
    for sample in read_rows(source, rows):
        data, restarts = sample.data, sample.restart_offsets
        smaller = _shrink(data, longer_side) if longer_side else None
        if smaller is not None:
            data, restarts = smaller, None
        if restarts is None and retile is not None:
            data, restarts = retile(data) or (data, None)
        images.append(StoredImage(data, _stored_name(sample), sample.label, restart_offsets=restarts))
    return images


def _stored_name(sample: Sample) -> str:
    return sample.path or sample.where.rsplit("/", 1)[-1]


def _shrink(data: bytes, longer_side: int) -> bytes | None:
    """A JPEG no larger than this, upright; None if the image is small enough, or broken, and stays as it is."""
    try:
        height, width = image_size(data)
        scale = longer_side / max(height, width)
        if scale >= 1:
            return None
        pixels = np.ascontiguousarray(decode_rgb(data))
    except DecodeError:
        return None
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    out = io.BytesIO()
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    small.save(out, "JPEG", quality=RESIZED_QUALITY, subsampling="4:2:0")
    return out.getvalue()


def _tiler() -> Callable[[bytes], tuple[bytes, Any] | None] | None:
    """The function that makes a restart-tile JPEG, if its tool is there."""
    try:
        tiles = importlib.import_module("mixmae.data.images.tiles")
    except ImportError:
        return None
    return tiles.retile if tiles.tool_path() else None


def _fingerprint(origin: dict[str, Any], facts: Sequence[str]) -> str:
    text = "\n".join([json.dumps([MANIFEST_FORMAT, origin], sort_keys=True), *facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether all shards that the manifest lists are there in their full size."""
    shards = [shard for split in manifest["splits"].values() for shard in split["files"]]
    return all(
        (folder / shard["name"]).is_file() and (folder / shard["name"]).stat().st_size == shard["bytes"]
        for shard in shards
    )


def _prepare_output(folder: Path, work: _Work, overwrite: bool) -> None:
    """Keep the shards of an interrupted run over the same source, clear away other shards if told, refuse all else."""
    ours = [path for path in folder.iterdir() if path.suffix == ".parquet" or path.name == MANIFEST_NAME]
    ours += [path for path in folder.glob(f"*{INDEX_SUFFIX}") if path not in ours]
    if any(str(path) in work.files for path in ours):
        raise DataError(f"the output folder {folder} holds the source itself: choose another one")
    leftovers = [path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(".tmp")]
    others = [path for path in folder.iterdir() if path not in [*ours, *leftovers] and path.name != _PROGRESS_NAME]
    progress = read_json(folder / _PROGRESS_NAME)
    continues = progress is not None and progress.get("fingerprint") == work.fingerprint
    if not continues and (ours or others) and not overwrite:
        first = sorted(path.name for path in [*ours, *others])[0]
        raise DataError(
            f"the output folder {folder} is not empty (it holds {first}): choose another one, or pass --overwrite to "
            f"replace the shards in it"
        )
    for path in leftovers if continues else [*ours, *leftovers]:
        path.unlink()


def _result(folder: Path, manifest: dict[str, Any], *, made: bool) -> MadeShards:
    classes = manifest["classes"]
    return MadeShards(
        folder=folder,
        rows={split: content["rows"] for split, content in manifest["splits"].items()},
        num_bytes=sum(content["bytes"] for content in manifest["splits"].values()),
        class_names=tuple(classes) if classes is not None else None,
        digest=manifest["digest"],
        num_broken=sum(len(content["summary"]["broken"]) for content in manifest["splits"].values()),
        made=made,
    )


def main(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[str, tyro.conf.Positional],
    shard_mb: float = 128.0,
    resize_longer_side: int | None = None,
    tiles: bool | None = None,
    seed: int = 0,
    workers: int = 0,
    ray_address: str | None = None,
    overwrite: bool = False,
) -> None:
    """Turn any collection of images, or the built-in shapes, into Parquet shards that every other command reads.

    Images keep their pixels and are stored in shuffled order. Folders named after classes become labels; without a
    validation split about 1 percent of the images (8 to 1000) are held out as one. An interrupted run continues.

    Args:
        source: Folder of images (flat, nested, one folder per class, or train/ and val/ with these inside), of
            WebDataset tars or of Parquet files; iNaturalist, Places205 or Places365 as unpacked; a list of files
            (.txt); a glob; a JSON list of sources; a URI such as s3://bucket/prefix; or the word "shapes" for the
            built-in set.
        output: Local folder for the shards and their manifest.json; made if it is missing.
        shard_mb: Aim for the size of a shard in megabytes.
        resize_longer_side: Shrink images whose longer side has more pixels (JPEG quality 95, 4:2:0); others stay.
        tiles: Store restart-tile JPEGs: lossless, and a crop decodes only the tiles it touches. Default: if jpegtran
            is installed.
        seed: Of the shuffle and of the choice of held-out images.
        workers: Shards written at once; 0 means one per core.
        ray_address: Write on this Ray cluster ("auto", "local", host:port) instead of in threads; OUTPUT, and a local
            SOURCE, must be on a disk that its nodes share.
        overwrite: Replace the shards that are in the output folder.
    """
    try:
        make_shards(
            source,
            output,
            shard_mb=shard_mb,
            resize_longer_side=resize_longer_side,
            tiles=tiles,
            seed=seed,
            workers=workers,
            ray_address=ray_address,
            overwrite=overwrite,
        )
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to a cluster's workers is this module's and not __main__'s.
    from pipelines.make_shards import main as _main

    tyro.cli(_main)
