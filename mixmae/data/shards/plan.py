"""Which images go into which shard: the rows of every shard in their shuffled order, and each image as it is stored.

A plan is made before anything is written. Its jobs are small and picklable, so that the machines of a cluster can write
shards at the same time; the fingerprint identifies what they are made from.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mixmae.data.account import account
from mixmae.data.chunks import Int64Array
from mixmae.data.images import tiles
from mixmae.data.images.decode import DecodeError, decode_image, has_alpha, image_size
from mixmae.data.order import Draw, Plan, permutation
from mixmae.data.shards import moths, scenes, shapes
from mixmae.data.shards.drawing import draw_apart
from mixmae.data.shards.write import MANIFEST_FORMAT, StoredImage, shard_name, shard_schema
from mixmae.data.source import DataError, Sample, Source, read_rows
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.folders import FilesSource
from mixmae.data.sources.joined import JoinedSource
from mixmae.data.sources.parquet import ParquetSource
from mixmae.data.sources.storage import plain_place
from mixmae.data.truth import DenseClasses, DenseSource, dense_classes, fitted, read_truths

BUILT_IN = {"moths": moths, "scenes": scenes, "shapes": shapes}
"""The words that name a built-in set instead of a path; moths:0.6 is one of another difficulty (moths.LEAN)."""
DEFAULT_SET = "moths"
MIN_IMAGES = 8
RESIZED_QUALITY = 95
"""JPEG quality of images that resize_longer_side shrinks; colour at half resolution (4:2:0), as cameras store it."""

_DRAWN_PER_SHARD = 1000
"""Five shards, so that several cores draw at once."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    split: str
    number: int
    count: int
    images: Callable[[], list[StoredImage]]

    @property
    def file_name(self) -> str:
        return shard_name(self.split, self.number, self.count)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All shards of a set."""

    jobs: list[ShardJob]
    schema: pa.Schema
    class_names: tuple[str, ...] | None
    fingerprint: str
    """Of what the shards are made from: 64 hex digits."""
    origin: dict[str, Any]
    """The source and the options, for the manifest."""
    met: dict[str, Any]
    """What was met in the source, for the manifest and to be printed (Account.as_json)."""
    report: tuple[str, ...] = ()
    """The same for people, where something is left out."""
    files: frozenset[str] = frozenset()
    """Local Parquet files that are read."""


def built_in(source: str) -> bool:
    """Whether a source is a built-in set; a file or folder of such a name is meant by ./moths."""
    return source in BUILT_IN or (source.startswith("moths:") and "/" not in source)


def plan_built_in(source: str, seed: int) -> ShardPlan:
    """The shards of a built-in set.   Raises: DataError if its difficulty cannot be read."""
    name, _, lean = source.partition(":")
    drawn: Any = BUILT_IN[name]
    options = (_lean(source, lean),) if name == "moths" else ()
    dense: DenseClasses | None = getattr(drawn, "DENSE", None)
    per_shard = getattr(drawn, "PER_SHARD", _DRAWN_PER_SHARD)
    counts = {"train": drawn.NUM_TRAIN // per_shard, "validation": drawn.NUM_VALIDATION // per_shard}
    starts = {"train": 0, "validation": drawn.NUM_TRAIN}
    jobs = []
    for split, count in counts.items():
        for number in range(count):
            start = starts[split] + number * per_shard
            draw = partial(_draw, name, (seed, *options), start, start + per_shard)
            jobs.append(ShardJob(split, number, count, draw))
    origin = {"source": source, "generator_version": drawn.GENERATOR_VERSION, "seed": seed}
    return ShardPlan(
        jobs=jobs,
        schema=shard_schema(None if dense else drawn.CLASS_NAMES, with_masks=dense is None, dense=dense),
        class_names=None if dense else drawn.CLASS_NAMES,
        fingerprint=_fingerprint(origin, []),
        origin=origin,
        met={"looked_at": {}, "notes": []},
    )


def plan_source(
    location: str, *, shard_mb: float, resize_longer_side: int | None, tile: bool | None, seed: int
) -> ShardPlan:
    """The shards of a collection of images.

    Args: as pack.make_shards; tile: its `tiles`.
    Raises: DataError if the collection cannot be opened or is too small, or tiles are asked for without the tool.
    """
    if tile and tiles.tool_path() is None:
        raise DataError(
            "restart tiles need jpegtran, which is not installed: apt-get install libjpeg-turbo-progs (Debian, "
            "Ubuntu), brew install jpeg-turbo (macOS), or leave --tiles out to store JPEGs as they are"
        )
    sources = {split: open_source(location, split) for split in list_splits(location)}
    problems = [source.problems for source in sources.values() if isinstance(source, FilesSource)]
    total = sum(source.num_rows for source in sources.values()) - sum(map(len, problems))
    if "train" not in sources:
        raise DataError(f"{location} has no train split, only {', '.join(sources)}: name a folder or file for training")
    if total < MIN_IMAGES:
        raise DataError(f"only {total} images in {location}: training needs at least {MIN_IMAGES}")
    orders = {
        split: (source, _shuffled(source, shard_mb, seed, number))
        for number, (split, source) in enumerate(sorted(sources.items()))
    }
    if "validation" not in orders:
        source, rows = orders["train"]
        train, held_out = _hold_out(source, rows, seed)
        orders |= {"train": (source, train), "validation": (source, held_out)}

    jobs = []
    for split in sorted(orders):
        source, rows = orders[split]
        split_bytes = source.num_bytes * len(rows) / source.num_rows
        count = max(1, min(len(rows), round(split_bytes / (shard_mb * 1e6))))
        for number in range(count):
            part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
            images = partial(_read_images, source, part, resize_longer_side, tile is not False)
            jobs.append(ShardJob(split, number, count, images))
    # Only what changes the result: the same photos elsewhere are the same set.
    origin = {
        "source": plain_place(location),
        "seed": seed,
        "shard_mb": shard_mb,
        "resize_longer_side": resize_longer_side,
        "tiles": tile,
    }
    facts = [f"{split} {source.digest}" for split, source in sorted(sources.items())]
    class_names = sources["train"].class_names
    known = {split: dense_classes(source) for split, source in sources.items()}
    dense = known["train"]
    for split, classes in known.items():
        if classes is not None and classes != dense:
            raise DataError(
                f"the {split} images of {location} have other classes of pixels or objects than the train "
                "images: take both of one release"
            )
    met = account(sources)  # of what was met when the truth was asked for, too
    return ShardPlan(
        jobs=jobs,
        schema=shard_schema(class_names, labelled=any(source.has_labels for source in sources.values()), dense=dense),
        class_names=class_names,
        fingerprint=_fingerprint(origin, facts),
        origin=origin,
        met=met.as_json(),
        report=tuple(map(str, met.notes)),
        files=frozenset(file for source in sources.values() for file in _parquet_files(source)),
    )


def _hold_out(source: Source, rows: Int64Array, seed: int) -> tuple[Int64Array, Int64Array]:
    """Choose about 1 % of the rows, 8 to 1000, as a validation split: (what remains, what is held out)."""
    count = min(max(round(len(rows) / 100), 8), 1000, len(rows) // 4)
    chosen = np.zeros(source.num_rows, dtype=bool)
    chosen[rows[permutation(len(rows), Draw.HOLDOUT, seed)[:count]]] = True
    held = rows[chosen[rows]]
    if isinstance(source, JoinedSource):  # no copy of a held-out image is for training, and it is held out once
        stored = source.stored_rows
        chosen = np.isin(stored, stored[held])
        held = held[np.sort(np.unique(stored[held], return_index=True)[1])]
    return rows[~chosen[rows]], held


def _shuffled(source: Source, shard_mb: float, seed: int, number: int) -> Int64Array:
    """All rows in a shuffled order in which no chunk is read many times.

    If single rows can be read, this is a permutation of all rows. Otherwise rows are shuffled inside windows of
    permuted chunks, about one shard each, so that a chunk is read once or twice.
    """
    if source.exact_reads:
        return permutation(source.num_rows, Draw.HOLDOUT, seed, number)
    window = max(1, int(shard_mb * 1e6 * source.num_rows / max(1, source.num_bytes)))
    return Plan(chunk_sizes=source.chunk_sizes, seed=seed, window_rows=window).rows_at(0, source.num_rows)[0]


def _parquet_files(source: Source) -> Iterator[str]:
    if isinstance(source, ParquetSource):
        yield from source.files
    elif isinstance(source, JoinedSource):
        for part in source.parts:
            yield from _parquet_files(part)


def _fingerprint(origin: dict[str, Any], facts: Sequence[str]) -> str:
    text = "\n".join([json.dumps([MANIFEST_FORMAT, origin], sort_keys=True), *facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _lean(source: str, text: str) -> float:
    try:
        lean = float(text) if text else moths.LEAN
    except ValueError:
        lean = -1.0
    if not 0 <= lean <= 1:
        raise DataError(
            f"{source}: the number after the colon is the probability that a trait is its species' own, from 0 to 1, "
            f"such as moths:{moths.LEAN}"
        )
    return lean


def _draw(name: str, arguments: tuple[float, ...], start: int, stop: int) -> list[StoredImage]:
    drawn: Any = BUILT_IN[name]
    images = []
    for index, image in enumerate(draw_apart(drawn.__name__, *arguments, start=start, stop=stop), start):
        if isinstance(image, scenes.DrawnScene):
            images.append(StoredImage(image.jpeg, f"{index:06d}.jpg", truth=image.truth))
            continue
        stored = f"{drawn.CLASS_NAMES[image.label]}/{index:06d}.jpg"
        images.append(StoredImage(image.jpeg, stored, image.label, image.box, image.mask_png))
    return images


def _read_images(source: Source, rows: Int64Array, longer_side: int | None, tile: bool) -> list[StoredImage]:
    """These rows as they go into a shard; an image without bytes stays a row, so that it is counted."""
    images = []
    known = isinstance(source, DenseSource) and source.dense is not None
    truths = read_truths(source, rows) if isinstance(source, DenseSource) and known else [None] * len(rows)
    for sample, truth in zip(read_rows(source, rows), truths, strict=True):
        data, restarts = sample.data, sample.restart_offsets
        smaller = _shrink(data, longer_side) if longer_side else None
        if smaller is not None:
            data, restarts = smaller, None
        if truth is not None:
            truth = fitted(truth, sample.data, data)
        if restarts is None and tile:
            data, restarts = tiles.retile(data) or (data, None)
        images.append(StoredImage(data, _stored_name(sample), sample.label, restart_offsets=restarts, truth=truth))
    return images


def _stored_name(sample: Sample) -> str:
    return sample.path or sample.where.rsplit("/", 1)[-1]


def _shrink(data: bytes, longer_side: int) -> bytes | None:
    """An image no larger than this, upright: a JPEG, or a PNG if it has alpha; None if it may stay as it is, or is
    broken."""
    try:
        height, width = image_size(data)
        scale = longer_side / max(height, width)
        if scale >= 1:
            return None
        channels = 4 if has_alpha(data) else 3
        pixels = np.ascontiguousarray(decode_image(data, channels))
    except DecodeError:
        return None
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    out = io.BytesIO()
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    if channels == 4:
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=RESIZED_QUALITY, subsampling="4:2:0")
    return out.getvalue()
