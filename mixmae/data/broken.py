"""Broken images by name: those that are left out of a figure, and sets of which hardly an image decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mixmae.data.blocks import BrokenRecord
from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, decode_rgb
from mixmae.data.source import DataError, Source, read_rows

NAMED = 3
"""Broken images that a sentence names."""
_CHUNKS, _ROWS = 4, 8
"""Chunks that are looked at when a run begins, spread over the set, and rows spread over each."""


def name_broken(records: Sequence[BrokenRecord], num_images: int | None = None, *, count: int | None = None) -> str:
    """Say how many images are broken, and name the first of them.

    Args: num_images: images in all, if that is known.  count: broken ones, if `records` has not all of them.
    """
    count = len(records) if count is None else count
    images = f"{count} image{'s' * (count != 1)}" if num_images is None else f"{count} of {num_images} images"
    first = "; ".join(f"{record.where}: {record.reason}" for record in records[:NAMED])
    more = f"; and {count - NAMED} more" if count > NAMED else ""
    return f"{images} could not be used ({first}{more})"


class NothingDecodes(DataError):
    """All images that were asked for are broken."""

    def __init__(self, source: Source, records: Sequence[BrokenRecord]) -> None:
        """Args: records: at least one of them."""
        super().__init__(
            f"no image of {source.name} could be decoded, for example {records[0].where}: {records[0].reason}; give "
            "complete image files, in a format of docs/data.md."
        )
        self.records = tuple(records)


def find_broken(source: Source, rows: Iterable[int] | Int64Array) -> list[BrokenRecord]:
    """Those of these rows that do not decode."""
    wanted = np.fromiter(rows, dtype=np.int64)
    records = []
    for row, sample in zip(wanted.tolist(), read_rows(source, wanted), strict=True):
        try:
            decode_rgb(sample.data)
        except DecodeError as error:
            records.append(BrokenRecord(row, sample.where, sample.problem or str(error)))
    return records


def check_decoding(source: Source, is_hopeless: Callable[[int, int], bool]) -> None:
    """Look at a few images before a run starts, and refuse a set of which hardly any decodes.

    Args: is_hopeless: of the numbers of broken images and of images, as LoopConfig.is_hopeless.
    Raises: DataError.
    """
    chunks = np.unique(np.linspace(0, len(source.chunk_sizes) - 1, _CHUNKS).astype(np.int64))
    rows = np.concatenate([_spread(source, chunk) for chunk in chunks.tolist()])
    broken = find_broken(source, rows)
    if is_hopeless(len(broken), len(rows)):
        raise DataError(
            f"{len(broken)} of {len(rows)} images of {source.name} that were looked at could not be used, for "
            f"example {broken[0].where}: {broken[0].reason}; pipelines/stats.py names all of them: repair the set or "
            "leave them out."
        )


def _spread(source: Source, chunk: int) -> Int64Array:
    """Rows of the source, spread over one of its chunks."""
    size = int(source.chunk_sizes[chunk])
    inside = np.unique(np.linspace(0, size - 1, min(_ROWS, size)).astype(np.int64))
    return source.chunks.starts[chunk] + inside
