"""Turn a folder of images, or the built-in shapes, into Parquet shards that every other command reads.

    python pipelines/make_shards.py SOURCE OUTPUT

SOURCE is a folder of image files: flat, nested, one folder per class, or train/ and val/ with any of these inside.
The word `shapes` instead of a folder draws the built-in set. Files are stored byte for byte and shuffled. Without a
val/ folder about 1 % of the images (8 to 1000) are held out as a validation split.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import tyro

from mixmae.data import shapes
from mixmae.data.folders import ImageFile, list_images
from mixmae.data.order import Draw, permutation
from mixmae.data.shards import (
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
from mixmae.data.sources import MANIFEST_NAME, DataError

SHAPES = "shapes"
MIN_IMAGES = 8

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
    unreadable: tuple[str, ...]
    """Files that were left out because they are empty or cannot be read, each with the reason."""
    made: bool
    """False if the shards were there already and up to date."""


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    split: str
    number: int
    count: int
    images: Callable[[], Iterator[StoredImage]]

    @property
    def file_name(self) -> str:
        return shard_name(self.split, self.number, self.count)


@dataclass(frozen=True)
class _Work:
    """All that a source asks for."""

    jobs: list[_Job]
    schema: pa.Schema
    class_names: tuple[str, ...] | None
    fingerprint: str
    origin: dict[str, Any]
    unreadable: list[str] = field(default_factory=list)


def make_shards(
    source: str | Path,
    output: str | Path,
    *,
    shard_mb: float = 128.0,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> MadeShards:
    """Write a source as shards with a manifest; if they are there already and up to date, do nothing.

    An interrupted run is continued: finished shards are kept if the source has not changed.

    Args:   source: folder of image files, or "shapes".  output: folder to write, made if missing.
            shard_mb: aim for the size of a shard in megabytes.  seed: of the shuffle and the held-out choice.
            workers: shards written at once; 0 means one per core.  overwrite: replace shards of another source.
            say: where progress lines go.
    Raises: DataError if the source has no usable image or the output may not be written.
    """
    started = time.monotonic()
    if shard_mb <= 0:
        raise DataError(f"shard_mb is {shard_mb}: give the aim for a shard's size in megabytes, such as 128")
    folder = Path(output).expanduser().resolve()
    work = _plan_shapes(seed) if str(source) == SHAPES else _plan_folder(Path(source), shard_mb, seed)
    finished = read_json(folder / MANIFEST_NAME)
    if finished is not None and finished.get("fingerprint") == work.fingerprint and _is_whole(folder, finished):
        say(f"{folder} already holds these shards, up to date: nothing to do")
        return _result(folder, finished, tuple(finished["origin"]["unreadable"]), made=False)
    _prepare_output(folder, work.fingerprint, overwrite)

    for line in work.unreadable[:5]:
        say(f"left out: {line}")
    if work.unreadable:
        say(f"{len(work.unreadable)} files are empty or unreadable and were left out; all are named in {MANIFEST_NAME}")
    write_json(folder / _PROGRESS_NAME, {"fingerprint": work.fingerprint})

    done: dict[str, ShardFile] = {}

    def write(job: _Job) -> None:
        path = folder / job.file_name
        shard = describe_shard(path) if path.exists() else write_shard(path, job.images(), work.schema)
        done[job.file_name] = shard
        say(f"{len(done)}/{len(work.jobs)} {shard.name}: {shard.rows} images, {shard.bytes / 1e6:.1f} MB")

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(write, job) for job in work.jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    splits: dict[str, list[ShardFile]] = {}
    for job in work.jobs:
        splits.setdefault(job.split, []).append(done[job.file_name])
    origin = {**work.origin, "unreadable": sorted(work.unreadable)}
    write_manifest(folder, splits=splits, class_names=work.class_names, fingerprint=work.fingerprint, origin=origin)
    (folder / _PROGRESS_NAME).unlink(missing_ok=True)
    result = _result(folder, read_json(folder / MANIFEST_NAME) or {}, tuple(origin["unreadable"]), made=True)
    counts = " + ".join(f"{rows} {split}" for split, rows in result.rows.items())
    say(f"{folder}: {counts} images, {result.num_bytes / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return result


def default_shapes(output: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """The folder of the embedded default set, made if it is not there yet: 4,000 + 1,000 images of 20 classes."""
    return make_shards(SHAPES, output, say=say).folder


def is_image_folder(path: str | Path) -> bool:
    """Whether make_shards has to prepare this path first: a folder, with no Parquet file anywhere in it."""
    folder = Path(path).expanduser()
    return folder.is_dir() and next(folder.rglob("*.parquet"), None) is None


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


def _shapes(seed: int, start: int, stop: int) -> Iterator[StoredImage]:
    for index, image in enumerate(shapes.shape_images(seed, start, stop), start):
        name = f"{shapes.CLASS_NAMES[image.label]}/{index:06d}.jpg"
        yield StoredImage(image.jpeg, name, image.label, image.box, image.mask_png)


def _plan_folder(source: Path, shard_mb: float, seed: int) -> _Work:
    listing = list_images(source)
    if listing.num_files < MIN_IMAGES:
        raise DataError(
            f"only {listing.num_files} images in {source.expanduser().resolve()}: training needs at least {MIN_IMAGES}"
        )
    splits = {
        split: [files[place] for place in permutation(len(files), Draw.HOLDOUT, seed, number)]
        for number, (split, files) in enumerate(sorted(listing.splits.items()))
    }
    if "validation" not in splits:
        total = len(splits["train"])
        held_out = min(max(round(total / 100), 8), 1000, total // 4)
        splits["validation"], splits["train"] = splits["train"][:held_out], splits["train"][held_out:]
    unreadable = list(listing.unreadable)
    jobs = []
    for split in sorted(splits):
        files = splits[split]
        total_bytes = sum(file.num_bytes for file in files)
        count = max(1, min(len(files), round(total_bytes / (shard_mb * 1e6))))
        for number in range(count):
            part = files[number * len(files) // count : (number + 1) * len(files) // count]
            jobs.append(_Job(split, number, count, partial(_stored_files, part, unreadable)))
    # Only what changes the result: the same photos elsewhere are the same set.
    origin = {"source": str(source.expanduser().resolve()), "seed": seed, "shard_mb": shard_mb}
    facts = [
        f"{file.relative} {file.num_bytes} {file.modified_ns} {file.label}"
        for split in sorted(listing.splits)
        for file in listing.splits[split]
    ]
    schema = shard_schema(listing.class_names)
    return _Work(jobs, schema, listing.class_names, _fingerprint(origin, facts), origin, unreadable)


def _stored_files(files: Sequence[ImageFile], unreadable: list[str]) -> Iterator[StoredImage]:
    for file in files:
        try:
            data = file.path.read_bytes()
        except OSError as error:  # it was readable when the folder was listed
            unreadable.append(f"{file.relative} ({error.strerror})")
            continue
        yield StoredImage(data, file.relative, file.label)


def _fingerprint(origin: dict[str, Any], facts: list[str]) -> str:
    text = "\n".join([json.dumps([MANIFEST_FORMAT, origin], sort_keys=True), *facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether all shards that the manifest lists are there in their full size."""
    shards = [shard for split in manifest["splits"].values() for shard in split["files"]]
    return all(
        (folder / shard["name"]).is_file() and (folder / shard["name"]).stat().st_size == shard["bytes"]
        for shard in shards
    )


def _prepare_output(folder: Path, fingerprint: str, overwrite: bool) -> None:
    """Make the folder, keep the shards of an interrupted run over the same source, refuse anything else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}): choose another output folder") from error
    ours = [path for path in folder.iterdir() if path.suffix == ".parquet" or path.name == MANIFEST_NAME]
    leftovers = [path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(".tmp")]
    others = [path for path in folder.iterdir() if path not in [*ours, *leftovers] and path.name != _PROGRESS_NAME]
    progress = read_json(folder / _PROGRESS_NAME)
    continues = progress is not None and progress.get("fingerprint") == fingerprint
    if not continues and (ours or others) and not overwrite:
        first = sorted(path.name for path in [*ours, *others])[0]
        raise DataError(
            f"the output folder {folder} is not empty (it holds {first}): choose another one, or pass --overwrite to "
            f"replace the shards in it"
        )
    for path in leftovers if continues else [*ours, *leftovers]:
        path.unlink()


def _result(folder: Path, manifest: dict[str, Any], unreadable: tuple[str, ...], *, made: bool) -> MadeShards:
    classes = manifest["classes"]
    return MadeShards(
        folder=folder,
        rows={split: content["rows"] for split, content in manifest["splits"].items()},
        num_bytes=sum(content["bytes"] for content in manifest["splits"].values()),
        class_names=tuple(classes) if classes is not None else None,
        digest=manifest["digest"],
        unreadable=unreadable,
        made=made,
    )


def main(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    shard_mb: float = 128.0,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
) -> None:
    """Turn a folder of images, or the built-in shapes, into Parquet shards that every other command reads.

    Files are stored byte for byte, in shuffled order. Folders named after classes become labels; without a val folder
    about 1 percent of the images (8 to 1000) are held out as a validation split. An interrupted run continues.

    Args:
        source: Folder of image files (flat, nested, one folder per class, or train/ and val/ with these inside), or
            the word "shapes" for the built-in set.
        output: Folder for the shards and their manifest.json; made if it is missing.
        shard_mb: Aim for the size of a shard in megabytes.
        seed: Of the shuffle and of the choice of held-out images.
        workers: Shards written at once; 0 means one per core.
        overwrite: Replace the shards that are in the output folder.
    """
    try:
        make_shards(source, output, shard_mb=shard_mb, seed=seed, workers=workers, overwrite=overwrite)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main)
