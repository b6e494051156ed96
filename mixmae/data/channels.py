"""Grey images or coloured ones: does a set fit an encoder's channels? A few images tell, before a run starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from mixmae.data.images.decode import DecodeError, decode_rgb, has_colour
from mixmae.data.source import DataError, Source

_CHUNKS, _ROWS = 4, 8
"""Chunks that are looked at, spread over the set, and rows at the beginning of each."""


def check_channels(source: Source, channels: int) -> None:
    """Refuse coloured images for an encoder of one channel, and print it where only a few are coloured.

    Raises: DataError if at least half of the images that are looked at have colours.
    """
    if channels > 1:
        return
    coloured = list(_colours(source))
    if not any(coloured):
        return
    seen = f"{sum(coloured)} of {len(coloured)} images of {source.name} that were looked at have colours"
    if 2 * sum(coloured) >= len(coloured):
        raise DataError(
            f"{seen}, and the encoder takes one channel: give --encoder.in-channels 3 when pretraining or training "
            "from scratch, or make the images grey."
        )
    print(f"note: {seen}: they become grey, because the encoder takes one channel")


def note_grey(source: Source, channels: int) -> None:
    """Print it if all images seem to be grey, and the encoder takes more channels."""
    if channels == 1:
        return
    looked_at = 0
    for coloured in _colours(source):
        if coloured:
            return
        looked_at += 1
    if looked_at:
        print(
            f"note: all {looked_at} images of {source.name} that were looked at are grey, and the encoder takes "
            f"{channels} channels: --encoder.in-channels 1 makes an encoder for grey images"
        )


def _colours(source: Source) -> Iterator[bool]:
    """Whether images have colours, of some that decode."""
    for chunk in np.unique(np.linspace(0, len(source.chunk_sizes) - 1, _CHUNKS).astype(int)).tolist():
        for sample in source.read(chunk, range(min(_ROWS, int(source.chunk_sizes[chunk])))):
            with contextlib.suppress(DecodeError):
                yield has_colour(decode_rgb(sample.data))
