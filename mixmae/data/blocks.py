"""From a list of rows to a finished block of training images: the unit of work that a stream hands out.

A block is a pure function of (source, augment, seed, rows, epochs): whoever makes it, wherever, it comes out the same.
This module knows no Ray; `local_batches` is the whole data plane in one process, for tests and small things.
Legend: n images of a block, H W output size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from mixmae.data.images.augment import AugmentConfig, centre_crop, draw_crops, resize, resize_crop
from mixmae.data.images.decode import BrokenImage, Header, Uint8Array, decode_box, decode_rgb, read_header
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig, augment_further
from mixmae.data.order import Int64Array, Plan, worker_positions
from mixmae.data.sources.open import Sample, Source, chunk_of
from mixmae.patches import image_sides

_GREY = 128
_MAX_TRIES = 64
"""Images that are tried in the place of a broken one; where none of so many decodes, trying on would only cost time."""
_MIN_PARTS = 8
"""Parts of a block, at least, that threads share; a few per thread even out their ends."""


@dataclass(frozen=True)
class BrokenRecord:
    """A row that could not be decoded and what was found there: one line of the ledger."""

    row: int
    where: str
    reason: str


@dataclass(frozen=True)
class Block:
    """Finished images in the order that was asked for."""

    images: Uint8Array
    """(n, 3, H, W) uint8 RGB, contiguous."""
    rows: Int64Array
    """(n,) int64, the rows asked for, broken ones included."""
    labels: Int64Array
    """(n,) int64, -1 where there is none; of the image that is shown."""
    epochs: Int64Array
    """(n,) int64."""
    broken: dict[int, BrokenRecord]
    """What could not be decoded, by its place in the block."""


@dataclass(frozen=True)
class Batch:
    """One worker's micro-batch."""

    images: torch.Tensor
    """(B, 3, H, W) uint8 RGB. May be a read-only view into the object store: do not write to it."""
    rows: torch.Tensor
    """(B,) int64, row of every image in its source."""
    labels: torch.Tensor
    """(B,) int64, -1 where there is none."""
    epochs: torch.Tensor
    """(B,) int64."""
    broken: tuple[BrokenRecord, ...]
    """Images of this batch that could not be decoded and were replaced."""


def load_block(
    source: Source,
    augment: AugmentConfig,
    rows: Int64Array,
    epochs: Int64Array,
    *,
    seed: int,
    pool: Executor | None = None,
) -> Block:
    """Read, decode, crop, resize and flip.

    Args: rows, epochs: (n,) int64, as Plan.rows_of gives them.  seed: of the plan.  pool: threads that share the work;
            decoder and resize let go of Python's lock.
    A broken image is replaced by the next one in storage order inside its chunk that decodes, cropped with the
    broken row's own random numbers, so that the substitute too depends on the row alone; grey if the next 63 do not.
    """
    rows, epochs = np.asarray(rows, dtype=np.int64), np.asarray(epochs, dtype=np.int64)
    images: Uint8Array = np.empty((len(rows), 3, *augment.size), dtype=np.uint8)
    canvas = torch.from_numpy(images)
    labels = np.full(len(rows), -1, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(source.chunk_sizes)])
    chunks = np.searchsorted(starts, rows, side="right") - 1

    def load(places: Int64Array) -> dict[int, BrokenRecord]:
        chunk = int(chunks[places[0]])
        samples = source.read(chunk, rows[places] - starts[chunk])
        headers: list[Header | None] = []
        reasons: dict[int, str] = {}
        for i, sample in enumerate(samples):
            try:
                headers.append(read_header(sample.data))
            except BrokenImage as error:
                headers.append(None)
                reasons[i] = str(error)
        sizes = np.array([header[:2] if header else (1, 1) for header in headers], dtype=np.int64)
        boxes, flips = draw_crops(augment, sizes, seed=seed, epochs=epochs[places], rows=rows[places])
        drawn = zip(samples, headers, places.tolist(), boxes.tolist(), flips.tolist(), strict=True)
        for i, (sample, header, place, box, flip) in enumerate(drawn):
            if header is not None:
                try:
                    resize(decode_box(sample.data, header, box, sample.restart_offsets), flip, canvas[place])
                    labels[place] = sample.label
                except BrokenImage as error:
                    reasons[i] = str(error)
        broken = {}
        for i, reason in reasons.items():
            place = int(places[i])
            row = int(rows[place])
            broken[place] = BrokenRecord(row, samples[i].where, reason)
            labels[place] = _substitute(source, augment, row, int(epochs[place]), seed, images[place])
        if isinstance(augment, FinetuneAugmentConfig):
            for place in places.tolist():
                augment_further(augment, images[place], seed=seed, epoch=int(epochs[place]), row=int(rows[place]))
        return broken

    # The rows of one chunk are read at once.
    order = np.argsort(chunks, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1)
    if pool is not None and len(parts) < _MIN_PARTS:  # too few to keep several threads busy to the end
        parts = [piece for part in parts for piece in np.array_split(part, min(len(part), _MIN_PARTS))]
    broken = {place: record for found in (pool.map if pool else map)(load, parts) for place, record in found.items()}
    return Block(images, rows, labels, epochs, broken)


def _substitute(source: Source, augment: AugmentConfig, row: int, epoch: int, seed: int, out: Uint8Array) -> int:
    """Show the next image of the chunk that decodes in the place of a broken one; returns its label."""
    chunk, inside = chunk_of(source, row)
    size = int(source.chunk_sizes[chunk])
    for step in range(1, min(size, _MAX_TRIES)):
        (sample,) = source.read(chunk, [(inside + step) % size])
        with contextlib.suppress(BrokenImage):
            pixels = decode_rgb(sample.data)
            sizes = np.array([pixels.shape[:2]], dtype=np.int64)
            boxes, flips = draw_crops(augment, sizes, seed=seed, epochs=np.array([epoch]), rows=np.array([row]))
            resize_crop(pixels, boxes[0], bool(flips[0]), out)
            return sample.label
    out[:] = _GREY
    return -1


def local_batches(
    source: Source,
    plan: Plan,
    augment: AugmentConfig,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    stop_step: int,
) -> Iterator[Batch]:
    """The batches of streams.TrainStream, made here and now without Ray."""
    share = check_batch(global_batch, micro_batch, rank, world_size)
    for start in range(start_step * share, stop_step * share, micro_batch):
        positions = worker_positions(start, start + micro_batch, rank, world_size, global_batch)
        yield as_batch(load_block(source, augment, *plan.rows_of(positions), seed=plan.seed))


def check_batch(global_batch: int, micro_batch: int, rank: int, world_size: int) -> int:
    """One worker's share of the global batch.   Raises: ValueError if the batch cannot be cut so."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} workers does not exist: ranks go from 0 to world_size - 1")
    if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world_size):
        raise ValueError(
            f"global_batch {global_batch} is not a multiple of micro_batch {micro_batch} x {world_size} workers: "
            f"change one of them"
        )
    return global_batch // world_size


def as_batch(block: Block) -> Batch:
    """A block as a batch, without a copy."""
    return Batch(
        images=torch.from_numpy(block.images),
        rows=torch.from_numpy(block.rows),
        labels=torch.from_numpy(block.labels),
        epochs=torch.from_numpy(block.epochs),
        broken=tuple(block.broken[place] for place in sorted(block.broken)),
    )


def eval_batch(
    source: Source, rows: Sequence[int], image_size: int | tuple[int, int], *, resize_share: float = 0.875
) -> torch.Tensor:
    """Fixed images without randomness, for panels and evaluation: (n, 3, H, W) uint8.

    Args: rows: of the source.  image_size: side, or (H, W).  resize_share: see augment.centre_crop.
    An image that does not decode comes out grey.
    """
    wanted = np.asarray(rows, dtype=np.int64)
    (batch,) = eval_batches(source, image_size, batch_size=len(rows), rows=wanted, resize_share=resize_share)
    return batch.images


def eval_batches(
    source: Source,
    image_size: int | tuple[int, int],
    *,
    batch_size: int,
    rows: Int64Array | None = None,
    resize_share: float = 0.875,
    pool: Executor | None = None,
) -> Iterator[Batch]:
    """Images with their labels in evaluation's fixed transform, in batches.

    Args: rows: (N,) int64 of the source, best in storage order; None: all, in storage order.  pool: threads that share
            the decoding.  Others: as eval_batch.
    Yields: batches of batch_size images, the last one shorter. An image that does not decode comes out grey, with label
        -1 so that nobody judges a model by it, and is among the batch's broken ones.
    """
    size = image_sides(image_size)
    rows = np.arange(source.num_rows) if rows is None else np.asarray(rows, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(source.chunk_sizes)])

    def load(row: int, sample: Sample) -> tuple[Uint8Array, int, BrokenRecord | None]:
        try:
            return centre_crop(decode_rgb(sample.data), size, resize_share), sample.label, None
        except BrokenImage as error:
            grey = np.full((3, *size), _GREY, dtype=np.uint8)
            return grey, -1, BrokenRecord(row, sample.where, str(error))

    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        chunks = np.searchsorted(starts, part, side="right") - 1
        samples: dict[int, Sample] = {}  # by row
        for chunk in np.unique(chunks):
            wanted = part[chunks == chunk]
            samples |= zip(wanted.tolist(), source.read(int(chunk), wanted - starts[chunk]), strict=True)
        loaded = (pool.map if pool else map)(load, part.tolist(), [samples[row] for row in part.tolist()])
        images, labels, broken = zip(*loaded, strict=True)
        yield Batch(
            images=torch.from_numpy(np.stack(images)),
            rows=torch.from_numpy(part),
            labels=torch.tensor(labels),
            epochs=torch.zeros(len(part), dtype=torch.int64),
            broken=tuple(record for record in broken if record),
        )


def read_row(source: Source, row: int) -> Sample:
    """One stored image by its row."""
    chunk, inside = chunk_of(source, row)
    return source.read(chunk, [inside])[0]
