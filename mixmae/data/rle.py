"""Masks of objects as run lengths, in COCO's compressed form: what pycocotools reads and writes, without it.

A mask is read column by column; the runs are of 0 and of 1 in turn, beginning with 0 (a run may be empty). From the
third run on, the difference to the run two before is written, in groups of five bits, the lowest first: each group is
one ASCII character from "0" on, whose sixth bit says that another group follows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST = ord("0")
_MORE, _SIGN = 0x20, 0x10


def encode_rle(mask: NDArray[np.bool_]) -> bytes:
    """Encode a mask (H, W) bool."""
    pixels = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]]) if mask.size else np.zeros(1, bool)
    runs = np.diff(np.flatnonzero(np.diff(pixels)), prepend=0).tolist()
    out = bytearray()
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        while True:
            group, value = value & 0x1F, value >> 5
            more = value != (-1 if group & _SIGN else 0)
            out.append(_FIRST + (group | _MORE if more else group))
            if not more:
                break
    return bytes(out)


def decode_rle(counts: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode what encode_rle or pycocotools made.

    Args: size: (H, W) of the mask.   Returns: (H, W) bool.   Raises: ValueError if the runs do not fill the mask.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = character - _FIRST
        value |= (group & 0x1F) << shift
        shift += 5
        if group & _MORE:
            continue
        if group & _SIGN:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    height, width = size
    if sum(runs) != height * width or any(run < 0 for run in runs):
        raise ValueError(f"a run-length mask has {sum(runs)} pixels, and its image is of {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T
