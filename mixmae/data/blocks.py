"""From a list of rows to a finished block of training images: the unit of work that a stream hands out.

A block is a pure function of (source, augment, seed, rows, epochs): it comes out the same on every process and machine.
This module does not know Ray; `local_batches` is the whole data plane in one process, for tests and small runs.
Legend: n images of a block, C channels (1 grey, 3 RGB, 4 RGBA), H W output size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from mixmae.data.chunks import Int64Array, group_by_chunk
from mixmae.data.images.augment import (
    AugmentConfig,
    BaseAugmentConfig,
    JointAugmentConfig,
    centre_crop,
    draw_crops,
    resize,
    resize_crop,
)
from mixmae.data.images.decode import DecodeError, Header, Uint8Array, decode_box, decode_image, read_header
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig, augment_further
from mixmae.data.order import Plan, worker_positions
from mixmae.data.source import Sample, Source, read_rows
from mixmae.data.truth import DenseSource, Truth
from mixmae.patches import image_sides
from mixmae.share import WorkerShare

_GREY = 128
_MAX_TRIES = 64
"""Images of a chunk that are tried as the substitute of a broken one; more would only cost time."""
_MIN_PARTS = 8
"""Parts of a block, at least, that threads share; a few per thread even out their ends."""


@dataclass(frozen=True)
class BrokenRecord:
    """A row that could not be used and why: one line of broken_images.jsonl."""

    row: int
    where: str
    reason: str


@dataclass(frozen=True)
class Block:
    """Finished images in the order that was asked for."""

    images: Uint8Array
    """(n, C, H, W) uint8, contiguous."""
    rows: Int64Array
    """(n,) int64, the rows asked for, broken ones included."""
    labels: Int64Array
    """(n,) int64, -1 where there is none; of the image that is shown."""
    epochs: Int64Array
    """(n,) int64."""
    broken: dict[int, BrokenRecord]
    """The images that could not be used, by their index in the block."""
    targets: tuple[Uint8Array, ...] = ()
    """n arrays (any length,) uint8, what a dense task wants to know of each image, packed (JointAugmentConfig.apply);
    empty for other tasks."""

    @classmethod
    def join(cls, blocks: Sequence[Block]) -> Block:
        """Several blocks as one, with a copy; a single one as it is."""
        if len(blocks) == 1:
            return blocks[0]
        starts = np.cumsum([0] + [len(block.rows) for block in blocks]).tolist()
        return cls(
            images=np.concatenate([block.images for block in blocks]),
            rows=np.concatenate([block.rows for block in blocks]),
            labels=np.concatenate([block.labels for block in blocks]),
            epochs=np.concatenate([block.epochs for block in blocks]),
            broken={
                start + index: record
                for start, block in zip(starts, blocks, strict=False)
                for index, record in block.broken.items()
            },
            targets=tuple(target for block in blocks for target in block.targets),
        )

    def part(self, start: int, stop: int) -> Block:
        """The images [start, stop), without a copy."""
        return Block(
            images=self.images[start:stop],
            rows=self.rows[start:stop],
            labels=self.labels[start:stop],
            epochs=self.epochs[start:stop],
            broken={index - start: record for index, record in self.broken.items() if start <= index < stop},
            targets=self.targets[start:stop],
        )


@dataclass(frozen=True)
class ImageBatch:
    """One worker's micro-batch."""

    images: torch.Tensor
    """(B, C, H, W) uint8. May be a read-only view into the object store: do not write to it."""
    rows: torch.Tensor
    """(B,) int64, row of every image in its source."""
    labels: torch.Tensor
    """(B,) int64, -1 where there is none."""
    epochs: torch.Tensor
    """(B,) int64."""
    broken: tuple[BrokenRecord, ...]
    """Images that could not be used: replaced by others in training, left out in evaluation."""
    targets: tuple[torch.Tensor, ...] = ()
    """B tensors (any length,) uint8, as Block.targets; read-only likewise."""


def load_block(
    source: Source,
    augment: BaseAugmentConfig,
    rows: Int64Array,
    epochs: Int64Array,
    *,
    seed: int,
    channels: int = 3,
    pool: Executor | None = None,
) -> Block:
    """Read, decode, crop, resize and flip.

    A broken image is replaced by the next one in storage order inside its chunk that decodes, cropped with the broken
    row's own random numbers, so that the substitute too depends on the row alone; grey if the next 63 do not decode.

    Args: augment: one for images alone, or a JointAugmentConfig, which needs a DenseSource.
        rows, epochs: (n,) int64, as Plan.rows_of gives them.  seed: of the plan.  channels: of the images.
        pool: threads that share the work; decoding and resizing release the GIL.
    Returns: the block of these rows, in their order.   Raises: DataError as Source.read does.
    """
    rows, epochs = np.asarray(rows, dtype=np.int64), np.asarray(epochs, dtype=np.int64)
    images: Uint8Array = np.empty((len(rows), channels, *augment.size), dtype=np.uint8)
    canvas = torch.from_numpy(images)
    labels = np.full(len(rows), -1, dtype=np.int64)
    chunks, within = source.chunks.locate(rows)
    targets: list[Uint8Array] = []

    def load_joint(part: Int64Array) -> dict[int, BrokenRecord]:
        assert isinstance(augment, JointAugmentConfig)
        assert isinstance(source, DenseSource)
        chunk = int(chunks[part[0]])
        pairs = zip(source.read(chunk, within[part]), source.read_truth(chunk, within[part]), strict=True)
        broken = {}
        for index, (sample, truth) in zip(part.tolist(), pairs, strict=True):
            keys = {"seed": seed, "epoch": int(epochs[index]), "row": int(rows[index])}
            try:
                targets[index] = _apply(source, augment, sample, truth, images[index], **keys)
            except DecodeError as error:
                broken[index] = BrokenRecord(keys["row"], sample.where, sample.problem or str(error))
                targets[index] = _joint_substitute(source, augment, images[index], **keys)
        return broken

    def load(part: Int64Array) -> dict[int, BrokenRecord]:
        assert isinstance(augment, AugmentConfig)
        samples = source.read(int(chunks[part[0]]), within[part])
        headers: list[Header | None] = []
        reasons: dict[int, str] = {}
        for i, sample in enumerate(samples):
            try:
                headers.append(read_header(sample.data))
            except DecodeError as error:
                headers.append(None)
                reasons[i] = sample.problem or str(error)
        sizes = np.array([header[:2] if header else (1, 1) for header in headers], dtype=np.int64)
        boxes, flips = draw_crops(augment, sizes, seed=seed, epochs=epochs[part], rows=rows[part])
        drawn = zip(samples, headers, part.tolist(), boxes.tolist(), flips.tolist(), strict=True)
        for i, (sample, header, index, box, flip) in enumerate(drawn):
            if header is not None:
                try:
                    pixels = decode_box(sample.data, header, box, sample.restart_offsets, channels=channels)
                    resize(pixels, flip, canvas[index])
                    labels[index] = sample.label
                except DecodeError as error:
                    reasons[i] = str(error)
        broken = {}
        for i, reason in reasons.items():
            index = int(part[i])
            row = int(rows[index])
            broken[index] = BrokenRecord(row, samples[i].where, reason)
            labels[index] = _substitute(source, augment, row, int(epochs[index]), seed, images[index])
        if isinstance(augment, FinetuneAugmentConfig):
            for index in part.tolist():
                augment_further(augment, images[index], seed=seed, epoch=int(epochs[index]), row=int(rows[index]))
        return broken

    # The rows of one chunk are read at once.
    parts = group_by_chunk(chunks)
    if pool is not None and len(parts) < _MIN_PARTS:  # too few to keep several threads busy to the end
        parts = [piece for part in parts for piece in np.array_split(part, min(len(part), _MIN_PARTS))]
    work = load
    if isinstance(augment, JointAugmentConfig):
        work, targets = load_joint, [augment.nothing] * len(rows)
    broken = {index: record for found in (pool.map if pool else map)(work, parts) for index, record in found.items()}
    return Block(images, rows, labels, epochs, broken, tuple(targets))


def _apply(
    source: DenseSource, augment: JointAugmentConfig, sample: Sample, truth: Truth, out: Uint8Array, **keys: int
) -> Uint8Array:
    """Decode an image and transform it with its truth; returns the target.   Raises: DecodeError."""
    classes = source.dense
    assert classes is not None
    return augment.apply(decode_image(sample.data, len(out)), truth, classes, out, **keys)


def _joint_substitute(source: DenseSource, augment: JointAugmentConfig, out: Uint8Array, **keys: int) -> Uint8Array:
    """As _substitute, of an image with its truth; returns the target."""
    for chunk, within in _next_in_chunk(source, keys["row"]):
        (sample,), (truth,) = source.read(chunk, [within]), source.read_truth(chunk, [within])
        with contextlib.suppress(DecodeError):
            return _apply(source, augment, sample, truth, out, **keys)
    out[:] = _GREY
    return augment.nothing


def _next_in_chunk(source: Source, row: int) -> Iterator[tuple[int, int]]:
    """The places (chunk, row inside it) that are tried in place of a broken row."""
    (chunk,), (within,) = source.chunks.locate([row])
    size = int(source.chunk_sizes[chunk])
    for step in range(1, min(size, _MAX_TRIES)):
        yield int(chunk), int(within + step) % size


def _substitute(source: Source, augment: AugmentConfig, row: int, epoch: int, seed: int, out: Uint8Array) -> int:
    """Write the next image of the chunk that decodes to `out`, in place of a broken row; returns its label."""
    for chunk, within in _next_in_chunk(source, row):
        (sample,) = source.read(chunk, [within])
        with contextlib.suppress(DecodeError):
            pixels = decode_image(sample.data, len(out))
            sizes = np.array([pixels.shape[:2]], dtype=np.int64)
            boxes, flips = draw_crops(augment, sizes, seed=seed, epochs=np.array([epoch]), rows=np.array([row]))
            resize_crop(pixels, boxes[0], bool(flips[0]), out)
            return sample.label
    out[:] = _GREY
    return -1


def local_batches(
    source: Source,
    plan: Plan,
    augment: BaseAugmentConfig,
    *,
    share: WorkerShare,
    start_step: int = 0,
    stop_step: int,
    channels: int = 3,
) -> Iterator[ImageBatch]:
    """The batches of streams.TrainStream, made in this process without Ray.

    Args: as TrainStream.
    Yields: the worker's micro-batches of the steps [start_step, stop_step).
    """
    for step in range(start_step, stop_step):
        for start, stop in itertools.pairwise(step * share.images + edge for edge in share.edges):
            rows, epochs = plan.rows_of(worker_positions(start, stop, share))
            yield as_batch(load_block(source, augment, rows, epochs, seed=plan.seed, channels=channels))


def as_batch(block: Block) -> ImageBatch:
    """A block as a batch, without a copy."""
    return ImageBatch(
        images=torch.from_numpy(block.images),
        rows=torch.from_numpy(block.rows),
        labels=torch.from_numpy(block.labels),
        epochs=torch.from_numpy(block.epochs),
        broken=tuple(block.broken[index] for index in sorted(block.broken)),
        targets=tuple(map(torch.from_numpy, block.targets)),
    )


def eval_batch(
    source: Source,
    rows: Sequence[int],
    image_size: int | tuple[int, int],
    *,
    crop_pct: float = 0.875,
    channels: int = 3,
) -> torch.Tensor:
    """Images in evaluation's fixed transform, for panels: (n, C, H, W) uint8, those of the rows that decode.

    Args: rows: of the source.  image_size: side, or (H, W).  crop_pct: see augment.centre_crop.  channels: C.
    """
    wanted = np.asarray(rows, dtype=np.int64)
    (batch,) = eval_batches(source, image_size, batch_size=len(rows), rows=wanted, crop_pct=crop_pct, channels=channels)
    return batch.images


def eval_batches(
    source: Source,
    image_size: int | tuple[int, int],
    *,
    batch_size: int,
    rows: Int64Array | None = None,
    crop_pct: float = 0.875,
    channels: int = 3,
    pool: Executor | None = None,
) -> Iterator[ImageBatch]:
    """Images with their labels in evaluation's fixed transform, in batches.

    Args: rows: (N,) int64 of the source, best in storage order; None: all, in storage order.  pool: threads that share
        the decoding.  image_size, crop_pct, channels: as eval_batch.
    Yields: batches of the images of batch_size rows each, the last one shorter. What does not decode is in no batch,
        so that no figure counts it, but among the batch's broken ones; a batch may be empty.
    """
    size = image_sides(image_size)
    rows = np.arange(source.num_rows) if rows is None else np.asarray(rows, dtype=np.int64)

    def load(row: int, sample: Sample) -> tuple[Uint8Array, int, int] | BrokenRecord:
        try:
            return centre_crop(decode_image(sample.data, channels), size, crop_pct), row, sample.label
        except DecodeError as error:
            return BrokenRecord(row, sample.where, sample.problem or str(error))

    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        loaded = list((pool.map if pool else map)(load, part.tolist(), read_rows(source, part)))
        whole = [item for item in loaded if not isinstance(item, BrokenRecord)]
        images = np.stack([pixels for pixels, _, _ in whole]) if whole else np.empty((0, channels, *size), np.uint8)
        yield ImageBatch(
            images=torch.from_numpy(images),
            rows=torch.tensor([row for _, row, _ in whole], dtype=torch.int64),
            labels=torch.tensor([label for _, _, label in whole], dtype=torch.int64),
            epochs=torch.zeros(len(whole), dtype=torch.int64),
            broken=tuple(item for item in loaded if isinstance(item, BrokenRecord)),
        )
