"""JPEGs cut into restart tiles, so that a crop decodes only what it touches.

`retile` rewrites a baseline JPEG losslessly: the same coefficients with optimised Huffman tables and a restart marker
after every few MCUs (minimum coded units, blocks of 8 or 16 px), so many that they divide a row of them. What lies
between two markers is an *interval*, and can be decoded without its neighbours. The file stays an ordinary JPEG.
`splice` cuts a box out of such a file as a small JPEG: the header with another size, the intervals that the box
touches, and the markers numbered anew. Its pixels are bit for bit those of the whole image, because the box is cut with
a margin for the upsampling of colour, which reads neighbouring pixels.
`head` is for a baseline JPEG without tiles: its decoder stops below the box.

Offsets: (num_intervals + 1,) uint32, the byte in the file at which each interval begins, and the file's end. The two
bytes before each of them but the first are the marker that ends the interval, so the last one follows the EOI.

Source: ITU T.81, sections B.2 (segments), B.2.4.4 (restart interval), E.1.4 (markers modulo 8).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Offsets = NDArray[np.uint32]

_TOOL = "jpegtran"
_TOOL_LIMIT_S = 120
_MARGIN_PX = 2
"""Fancy upsampling reads one colour sample, which is two pixels, beyond the pixel that it makes."""
_SAMPLINGS = {(1, 1), (2, 1), (1, 2), (2, 2)}
_MAX_TILE_PX = 48
"""Largest width of a tile; wider tiles need fewer bytes in the file but decode more pixels outside the crop."""
_MIN_SAVING = 0.06
"""If fewer than this share of the rows are left out, shortening the image costs more than it saves."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _SOS, _DRI, _APP1, _COM = 0xC0, 0xDA, 0xDD, 0xE1, 0xFE
_SKIPPED = (*range(0xE1, 0xEE), 0xEF, _COM)
"""Segments that do not affect the pixels: all APPs but JFIF's (0) and Adobe's (14), and comments."""
_CYCLE = np.tile(np.arange(0xD0, 0xD8, dtype=np.uint8), 1024)
"""Restart markers, numbered modulo 8."""


class JpegLayout(NamedTuple):
    """Where things are in a baseline JPEG of one scan."""

    height: int
    """Of the stored image, before EXIF orientation."""
    width: int
    exif: tuple[int, int] | None
    """Start and stop of the EXIF block's TIFF part."""
    size_at: int
    """Where SOF0 keeps its height and width, two bytes each."""
    scan_at: int
    """First byte of entropy-coded data."""
    skippable: tuple[tuple[int, int], ...]
    """Segments before the scan that do not matter for pixels."""
    mcu_h: int
    mcu_w: int
    interval: int
    """MCUs in a restart interval; 0 for none."""


def read_layout(data: bytes) -> JpegLayout | None:
    """Walk a JPEG's segments up to its scan.

    Returns: None for what is not baseline, has several scans, or samples its colours in an unusual way.
    """
    if data[:2] != _SOI:
        return None
    at, end = 2, len(data)
    height = width = size_at = interval = 0
    mcu_h = mcu_w = num_components = 0
    exif: tuple[int, int] | None = None
    skippable: list[tuple[int, int]] = []
    while at + 4 <= end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        length = (data[at + 2] << 8) | data[at + 3]
        stop = at + 2 + length
        if length < 2 or stop > end:
            return None
        if marker == _SOF0:
            num_components = data[at + 9] if length >= 8 else 0
            if size_at or num_components not in (1, 3) or length != 8 + 3 * num_components or data[at + 4] != 8:
                return None
            size_at = at + 5
            height, width = (data[at + 5] << 8) | data[at + 6], (data[at + 7] << 8) | data[at + 8]
            if num_components == 1:
                mcu_h = mcu_w = 8  # one component is not interleaved, so its sampling factors have no meaning
            else:
                across, down = data[at + 11] >> 4, data[at + 11] & 15
                if (across, down) not in _SAMPLINGS or data[at + 14] != 0x11 or data[at + 17] != 0x11:
                    return None
                mcu_h, mcu_w = 8 * down, 8 * across
        elif marker == _DRI:
            interval = (data[at + 4] << 8) | data[at + 5]
        elif marker == _SOS:
            if not size_at or data[at + 4] != num_components or height < 1 or width < 1:
                return None
            return JpegLayout(height, width, exif, size_at, stop, tuple(skippable), mcu_h, mcu_w, interval)
        elif marker == _APP1 and exif is None and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = (at + 10, stop)
        elif 0xC1 <= marker <= 0xCF and marker != 0xC4:  # another kind of frame, or arithmetic coding
            return None
        if marker in _SKIPPED:
            skippable.append((at, stop))
        at = stop
    return None


def splice(data: bytes, layout: JpegLayout, offsets: Offsets, box: Sequence[int]) -> tuple[bytearray, int, int]:
    """A JPEG of the tiles that a box touches.

    Args:   box: (top, left, height, width) in pixels of the stored image.
    Returns: the JPEG, and the box's top and left inside it.
    Raises: ValueError if the offsets are not those of this file.
    """
    top, left, height, width = box
    tile_w = layout.interval * layout.mcu_w
    mcu_h, per_row, num_rows = _grid(layout)
    if len(offsets) != per_row * num_rows + 1:
        raise ValueError("the restart offsets are not of this file")
    first_row, first_column = max(0, top - _MARGIN_PX) // mcu_h, max(0, left - _MARGIN_PX) // tile_w
    last_row = min(num_rows - 1, (top + height - 1 + _MARGIN_PX) // mcu_h)
    last_column = min(per_row - 1, (left + width - 1 + _MARGIN_PX) // tile_w)
    rows = last_row - first_row + 1

    # In one row of tiles the intervals of the box follow each other in the file.
    starts = offsets[first_row * per_row + first_column :: per_row][:rows].astype(np.int64)
    stops = offsets[first_row * per_row + last_column + 1 :: per_row][:rows].astype(np.int64)
    header, size_at = _header(data, layout)
    parts = [header, *(data[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))]
    spliced = bytearray(b"".join(parts))
    lengths = stops - starts
    shift = len(header) + np.cumsum(lengths) - stops
    marked = offsets[1:].reshape(num_rows, per_row)[first_row : last_row + 1, first_column : last_column + 1]
    markers = (marked + shift[:, None]).ravel() - 1
    view = np.frombuffer(spliced, dtype=np.uint8)
    if lengths.min() < 2 or len(view) != markers[-1] + 1 or (view[markers - 1] != 0xFF).any():
        raise ValueError("the restart offsets are not of this file")
    view[markers] = _CYCLE[: len(markers)] if len(markers) <= len(_CYCLE) else np.resize(_CYCLE, len(markers))
    view[-1] = _EOI[1]
    y0, x0 = first_row * mcu_h, first_column * tile_w
    stored_h = min(layout.height, (last_row + 1) * mcu_h) - y0
    stored_w = min(layout.width, (last_column + 1) * tile_w) - x0
    struct.pack_into(">HH", spliced, size_at, stored_h, stored_w)
    return spliced, top - y0, left - x0


def head(data: bytes, layout: JpegLayout, bottom: int) -> bytearray | None:
    """Change the height in a JPEG's header so that the decoder stops after row `bottom` (exclusive).

    The warning about the skipped bytes would hide damage, so this is only for files that end with an EOI.
    Returns: the JPEG; None if it would save too little, or the file does not end with an EOI.
    """
    height = -(-(bottom + _MARGIN_PX) // layout.mcu_h) * layout.mcu_h
    if height > layout.height * (1 - _MIN_SAVING) or data[-2:] != _EOI:
        return None
    short = bytearray(data)
    struct.pack_into(">H", short, layout.size_at, height)
    return short


def retile(data: bytes) -> tuple[bytes, Offsets] | None:
    """Rewrite a JPEG in restart tiles, without loss.

    Returns: the new file and its offsets; None if the file should stay as it is: not a baseline JPEG with usual
    sampling, damaged, too small to gain, or the tool is not installed.
    """
    layout = read_layout(data)
    tool = tool_path()
    if layout is None or tool is None:
        return None
    interval = _tile_mcus(layout)
    if interval is None:
        return None
    command = [tool, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TOOL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None  # 2 means warnings: the decoder of the original will report what is wrong
    tiled = done.stdout
    try:
        offsets = _find_offsets(tiled, interval)
        same = np.array_equal(simplejpeg.decode_jpeg(tiled), simplejpeg.decode_jpeg(data))
    except ValueError:
        return None
    return (tiled, offsets) if same else None


@lru_cache(maxsize=1)
def tool_path() -> str | None:
    """Where jpegtran is (Debian: apt-get install libjpeg-turbo-progs), or None: then JPEGs are stored as they are."""
    return shutil.which(_TOOL)


def _tile_mcus(layout: JpegLayout) -> int | None:
    """MCUs of a tile: the widest that divides a row of them and is not too wide; one where the row cannot be cut."""
    across = -(-layout.width // layout.mcu_w)
    if across * -(-layout.height // layout.mcu_h) < 4:
        return None
    return max(n for n in range(1, across + 1) if across % n == 0 and (n == 1 or n * layout.mcu_w <= _MAX_TILE_PX))


def _find_offsets(tiled: bytes, interval: int) -> Offsets:
    """The offsets of a tiled file, found by its markers.   Raises: ValueError if they are not what they should be."""
    layout = read_layout(tiled)
    if layout is None or layout.interval != interval or tiled[-2:] != _EOI:
        raise ValueError("the rewritten file is not laid out in tiles")
    scan = np.frombuffer(tiled, dtype=np.uint8)[layout.scan_at :]
    at = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] != 0))
    _, per_row, num_rows = _grid(layout)
    expected = np.append(np.resize(_CYCLE, per_row * num_rows - 1), _EOI[1])
    if not np.array_equal(scan[at + 1], expected):
        raise ValueError("the rewritten file's markers are not in order")
    return np.concatenate([[0], at + 2]).astype(np.uint32) + np.uint32(layout.scan_at)


def _grid(layout: JpegLayout) -> tuple[int, int, int]:
    """Height of a row of tiles in pixels, tiles in a row, rows.   Raises: ValueError if the tiles do not fill rows."""
    across = -(-layout.width // layout.mcu_w)
    if layout.interval == 0 or across % layout.interval:
        raise ValueError("the file is not laid out in tiles")
    return layout.mcu_h, across // layout.interval, -(-layout.height // layout.mcu_h)


def _header(data: bytes, layout: JpegLayout) -> tuple[bytes, int]:
    """All before the scan that matters for pixels, and where in it the size is."""
    if not layout.skippable:
        return data[: layout.scan_at], layout.size_at
    parts, at, size_at = [], 0, layout.size_at
    for start, stop in layout.skippable:
        parts.append(data[at:start])
        at = stop
        if stop <= layout.size_at:
            size_at -= stop - start
    parts.append(data[at : layout.scan_at])
    return b"".join(parts), size_at
