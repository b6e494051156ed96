"""Whole images with their class-index maps, as they are stored: for evaluation, and to look at a set before a run.

Legend: h w an image's size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, Uint8Array, decode_image
from mixmae.data.source import DataError, Sample, read_rows
from mixmae.data.truth import IGNORE, DenseSource, Truth, decode_map, read_truths

LOOKED_AT = 64
"""Images whose masks are looked at when a run begins, spread over the set."""


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and the classes of its pixels."""

    row: int
    where: str
    pixels: Uint8Array
    """(h, w, C) uint8."""
    indices: Uint8Array
    """(h, w) uint8, class indices or IGNORE."""


def read_pairs(
    source: DenseSource,
    rows: Int64Array,
    *,
    channels: int,
    batch_size: int,
    pool: Executor | None = None,
) -> Iterator[list[Pair | BrokenRecord]]:
    """Decode images and maps in batches; what cannot be used is a BrokenRecord in its place.

    Args: rows: (N,) int64, best in storage order.  channels: C.  pool: threads that share the decoding.
    """
    num_classes = len(source.dense.pixels or ()) if source.dense else 0

    def load(row: int, sample: Sample, truth: Truth) -> Pair | BrokenRecord:
        try:
            pixels = decode_image(sample.data, channels)
            return Pair(row, sample.where, pixels, decode_map(truth, pixels.shape[:2], num_classes))
        except DecodeError as error:
            return BrokenRecord(row, sample.where, sample.problem or str(error))

    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield list((pool.map if pool else map)(load, part.tolist(), read_rows(source, part), read_truths(source, part)))


def check_maps(source: DenseSource, is_hopeless: Callable[[int, int], bool]) -> None:
    """Look at the masks of a few images before a run starts, and refuse a set in which hardly any can be used.

    Args: is_hopeless: of the numbers of broken images and of images, as LoopConfig.is_hopeless.
    Raises: DataError, also if no pixel has a class.
    """
    rows = np.unique(np.linspace(0, source.num_rows - 1, min(LOOKED_AT, source.num_rows)).astype(np.int64))
    found = [item for batch in read_pairs(source, rows, channels=3, batch_size=16) for item in batch]
    broken = [item for item in found if isinstance(item, BrokenRecord)]
    if is_hopeless(len(broken), len(found)):
        raise DataError(
            f"{len(broken)} of {len(found)} images of {source.name} that were looked at cannot be used, for example "
            f"{broken[0].where}: {broken[0].reason}; repair the set, or say which value of a mask means what when it "
            "is packed (docs/segmentation.md)."
        )
    if all((item.indices == IGNORE).all() for item in found if isinstance(item, Pair)):
        raise DataError(
            f"no pixel of the {len(found)} masks of {source.name} that were looked at has a class: all are ignored. "
            "Say which value of a mask means what when the set is packed (docs/segmentation.md)."
        )
