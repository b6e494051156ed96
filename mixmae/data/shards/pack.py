"""Packing any collection of images, or a built-in set, into Parquet shards with a manifest.

Images keep their pixels: baseline JPEGs become restart-tile JPEGs (tiles.py: lossless, and a crop decodes only what it
shows) if jpegtran is installed, everything else is stored byte for byte. Rows are shuffled. Without a validation split
about 1 % of the images (8 to 1000) are held out as one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixmae.data.images import tiles as restart_tiles
from mixmae.data.images.summary import Summary
from mixmae.data.shards.plan import ShardJob, ShardPlan, built_in, plan_built_in, plan_source
from mixmae.data.shards.write import (
    ShardFile,
    StoredImage,
    describe_shard,
    read_json,
    write_manifest,
    write_shard,
)
from mixmae.data.source import DataError
from mixmae.data.sources import layout_of
from mixmae.data.sources.open import MANIFEST_NAME
from mixmae.data.sources.parquet import SEGMENTATION_COLUMN
from mixmae.data.sources.shard_index import INDEX_SUFFIX
from mixmae.data.sources.storage import writable_folder
from mixmae.data.truth import Truth
from mixmae.lock import in_turn
from mixmae.machine import usable_cores
from mixmae.writing import write_json

SUMMARY_IMAGES = 64
"""Images of each shard that are decoded for the manifest's mean and std: its first, which are shuffled."""

_PROGRESS_NAME = ".making.json"
_LOCK_NAME = ".lock"
"""A folder in the output, with the lock on it."""
_LEFTOVER = re.compile(r"\.partial\..*|\..*\.tmp")
"""Files that an interrupted run was writing; the second form is that of earlier versions."""


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
    """Rows known to be broken; the manifest lists them, and so does a run that reads them."""
    made: bool
    """False if the shards were there already and up to date."""


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard and the statistics of its images."""

    file: ShardFile
    summary: Summary


WriteJob = Callable[[ShardJob], WrittenShard]
RunJobs = Callable[[WriteJob, Sequence[ShardJob], int], Iterator[tuple[ShardJob, WrittenShard]]]
"""(function, jobs, how many at once; 0: as many as there are cores) -> each job with its result, when it is done."""


def run_in_threads(write: WriteJob, jobs: Sequence[ShardJob], workers: int) -> Iterator[tuple[ShardJob, WrittenShard]]:
    """Run the jobs in threads of this process."""
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        futures = {pool.submit(write, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_shards(
    source: str | Path,
    output: str | Path,
    *,
    shard_mb: float = 128.0,
    resize_longer_side: int | None = None,
    tiles: bool | None = None,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    run_jobs: RunJobs = run_in_threads,
    report: Callable[[str], None] = print,
) -> MadeShards:
    """Write a source as shards with a manifest; if they are there already and up to date, do nothing.

    An interrupted run is continued: finished shards are kept if the source has not changed. Of two commands that make
    the same shards at one time, the second waits for the first.

    Args:
        source: what open_source takes, or a built-in set: "moths", "moths:0.6", "shapes".
        output: local folder to write, made if missing.
        shard_mb: approximate size of a shard in megabytes.
        resize_longer_side: shrink images whose longer side has more pixels than this; others stay as they are.
        tiles: store restart-tile JPEGs; None does it if the tool is there.
        seed: of the shuffle and the held-out choice.  workers: shards written at once; 0 means one per core.
        overwrite: replace shards of another source.
        run_jobs: runs the jobs that write one shard each, in threads or on a cluster.  report: gets progress lines.
    Raises: DataError if the source has no usable image or the output may not be written.
    """
    if shard_mb <= 0:
        raise DataError(f"shard_mb is {shard_mb}: give the size of a shard in megabytes, such as 128")
    if resize_longer_side is not None and resize_longer_side < 1:
        raise DataError(f"resize_longer_side is {resize_longer_side}: give a length in pixels, such as 512")
    if workers < 0:
        raise DataError(f"workers is {workers}: give how many shards are written at once, or 0 for one per core")
    folder = writable_folder(output)
    if built_in(str(source)):
        plan = plan_built_in(str(source), seed)
    else:
        plan = plan_source(str(source), shard_mb=shard_mb, resize_longer_side=resize_longer_side, tile=tiles, seed=seed)
    for line in plan.report:
        report(f"note: {line}")
    if made := _finished(folder, plan, report):
        return made
    if not (folder / _LOCK_NAME).exists():
        _to_delete(folder, plan, overwrite)  # raises before anything is written to a folder of something else
    with in_turn(folder / _LOCK_NAME, str(folder), report):
        if made := _finished(folder, plan, report):  # by the one that was waited for
            return made
        return _make(folder, plan, tiles=tiles, workers=workers, overwrite=overwrite, run_jobs=run_jobs, report=report)


def _make(
    folder: Path,
    plan: ShardPlan,
    *,
    tiles: bool | None,
    workers: int,
    overwrite: bool,
    run_jobs: RunJobs,
    report: Callable[[str], None],
) -> MadeShards:
    """What make_shards does while nobody else writes to the folder."""
    started = time.monotonic()
    for path in _to_delete(folder, plan, overwrite):
        path.unlink()
    if "tiles" in plan.origin and tiles is not False and restart_tiles.tool_path() is None:
        report(
            "note: jpegtran is not installed, so JPEGs are stored as they are: training decodes all of each image "
            "instead of the crop alone, at about two thirds of the speed. To install it: apt-get install "
            "libjpeg-turbo-progs (Debian, Ubuntu), brew install jpeg-turbo (macOS); then make the shards again"
        )
    write_json(folder / _PROGRESS_NAME, {"fingerprint": plan.fingerprint}, indent=1)

    done: dict[str, WrittenShard] = {}
    for job, written in run_jobs(partial(_write, folder=folder, schema=plan.schema), plan.jobs, workers):
        done[job.file_name] = written
        file, elapsed = written.file, time.monotonic() - started
        left = elapsed / len(done) * (len(plan.jobs) - len(done))
        report(
            f"{len(done)}/{len(plan.jobs)} {file.name}: {file.rows} images, {file.bytes / 1e6:.1f} MB"
            + (f", about {left:.0f} s left" if left >= 10 else "")
        )
    summaries = _finish(folder, plan, done)

    result = _result(folder, read_json(folder / MANIFEST_NAME) or {}, made=True)
    broken = sorted(record for summary in summaries.values() for record in summary.broken)
    for where, reason in broken[:5]:
        report(f"no usable image: {where}: {reason}")
    if broken:
        report(
            f"{len(broken)} files are empty, unreadable or damaged: training replaces them by others, counts and "
            f"reports them; {MANIFEST_NAME} lists these"
        )
    counts = " + ".join(f"{rows} {split}" for split, rows in result.rows.items())
    classes = f" of {len(result.class_names)} classes" if result.class_names else ""
    report(f"{folder}: {counts} images{classes}, {result.num_bytes / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return result


def is_image_folder(path: str | Path) -> bool:
    """Whether a path is a local folder of image files, which training reads faster after make_shards.

    Raises: DataError if it is a folder without any image.
    """
    return Path(path).expanduser().is_dir() and layout_of(path) == "files"


def _write(job: ShardJob, folder: Path, schema: pa.Schema) -> WrittenShard:
    """Write a shard, or take the one that an interrupted run has left."""
    path = folder / job.file_name
    if path.exists():
        file = describe_shard(path)
        columns = [name for name in ("image", "label", SEGMENTATION_COLUMN) if name in schema.names]
        table = pq.read_table(path, columns=columns)
        cells = table.column("image").to_pylist()
        labels = table.column("label").to_pylist() if "label" in schema.names else [-1] * len(cells)
        maps = table.column(SEGMENTATION_COLUMN).to_pylist() if SEGMENTATION_COLUMN in schema.names else [None]
        truths = [Truth(problem="its mask cannot be used") if cell and not cell["bytes"] else None for cell in maps]
        images = [
            StoredImage(cell["bytes"], cell["path"], label, truth=truth)
            for cell, label, truth in zip(cells, labels, truths * (len(cells) // len(truths)), strict=True)
        ]
    else:
        images = job.images()
        file = write_shard(path, images, schema)
    summary = Summary()
    for row, image in enumerate(images):
        where = f"{path.name}#{row} / {image.path}"
        summary.add(image.data, image.label, where, decode=row < SUMMARY_IMAGES)
        if image.truth is not None and image.truth.problem:
            summary.broken.append((where, image.truth.problem))
    return WrittenShard(file, summary)


def _finish(folder: Path, plan: ShardPlan, done: dict[str, WrittenShard]) -> dict[str, Summary]:
    """Write the manifest over all shards; returns the summary of each split."""
    splits: dict[str, list[ShardFile]] = {}
    summaries: dict[str, Summary] = {}
    for job in plan.jobs:
        written = done[job.file_name]
        splits.setdefault(job.split, []).append(written.file)
        summaries.setdefault(job.split, Summary()).merge(written.summary)
    write_manifest(
        folder,
        splits=splits,
        class_names=plan.class_names,
        summaries={split: summary.as_dict(plan.class_names) for split, summary in summaries.items()},
        fingerprint=plan.fingerprint,
        origin=plan.origin,
        met=plan.met,
    )
    (folder / _PROGRESS_NAME).unlink(missing_ok=True)
    return summaries


def _finished(folder: Path, plan: ShardPlan, report: Callable[[str], None]) -> MadeShards | None:
    """The shards of the plan, if they are all there already in their full size."""
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest is None or manifest.get("fingerprint") != plan.fingerprint:
        return None
    shards = [shard for split in manifest["splits"].values() for shard in split["files"]]
    is_whole = all(
        (folder / shard["name"]).is_file() and (folder / shard["name"]).stat().st_size == shard["bytes"]
        for shard in shards
    )
    if not is_whole:
        return None
    report(f"{folder} already holds these shards, up to date: nothing to do")
    return _result(folder, manifest, made=False)


def _to_delete(folder: Path, plan: ShardPlan, overwrite: bool) -> list[Path]:
    """The files that have to go: other shards, if that is wanted, and what an interrupted run over the same source left
    half written; its shards stay.

    Raises: DataError if there is anything else.
    """
    ours = [path for path in folder.iterdir() if path.suffix == ".parquet" or path.name == MANIFEST_NAME]
    ours += [path for path in folder.glob(f"*{INDEX_SUFFIX}") if path not in ours]
    if any(str(path) in plan.files for path in ours):
        raise DataError(f"the output folder {folder} holds the source itself: choose another one")
    leftovers = [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    ours = [path for path in ours if path not in leftovers]
    known = {*ours, *leftovers, folder / _PROGRESS_NAME, folder / _LOCK_NAME}
    others = [path for path in folder.iterdir() if path not in known]
    progress = read_json(folder / _PROGRESS_NAME)
    continues = progress is not None and progress.get("fingerprint") == plan.fingerprint
    if not continues and (ours or others) and not overwrite:
        first = sorted(path.name for path in [*ours, *others])[0]
        raise DataError(
            f"the output folder {folder} is not empty (it holds {first}): choose another one, or pass --overwrite to "
            f"replace the shards in it"
        )
    return leftovers if continues else [*ours, *leftovers]


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
