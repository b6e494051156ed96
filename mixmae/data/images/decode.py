"""From an image file's bytes to RGB pixels, grey ones or RGBA, with one set of rules for every format.

simplejpeg (libjpeg-turbo) decodes plain JPEGs, grey or colour; Pillow decodes everything else and what simplejpeg
refuses. Both give the same pixels for the same JPEG. The rules:
- Orientation: the EXIF orientation is applied once, so an image is upright as it was photographed, whatever its format.
  (MAE's and MixMIM's loaders ignore it, which differs for a handful of ImageNet files.)
- Alpha, in palettes too: composited on white, or kept where four channels are asked for.
- One channel: grey files as they are, the luminance (ITU-R 601) of colours.
- CMYK: Pillow's conversion, which knows Adobe's inverted inks.
- 16-bit grey (modes I and I;16): divided by 257. Float: [0, 1] is stretched to 255 if nothing exceeds 1.
- Animations and multi-page files: the first frame.
- Strictness: a file that ends too early is broken, even if part of it could be shown.

Training needs a box of each image: `read_header` and then `decode_box`, which decodes as little of the file as its
layout allows (tiles.py) and gives the same pixels as decode_image.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mixmae.data.images.tiles import JpegLayout, Offsets, head, read_layout, splice

Uint8Array = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""A file with more pixels counts as broken, because it could fill the memory. Source: Pillow's limit."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""What an image can be decoded to: Pillow's mode for each number of channels."""

_TURBO_MODES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGBA"}
_TURBO_COLORSPACES = frozenset({"YCbCr", "RGB", "Gray"})
_GROUND = (255, 255, 255)
_COLOUR_LEVELS, _COLOUR_SHARE = 16, 0.001
"""A pixel has colour if its channels differ by more than so many of 255 levels (a JPEG's rounding stays below); an
image has, if more than this share of its pixels do."""
_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101
_EXIF_NUMBERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's kinds of whole numbers, as struct knows them. A short is right; other kinds occur."""

READS_HEIC = find_spec("pillow_heif") is not None
"""Whether the photos of phones (.heic) can be read: the extra `heic` is installed."""
if READS_HEIC:
    import_module("pillow_heif").register_heif_opener()


class DecodeError(ValueError):
    """A file that cannot be decoded; the message is the reason in broken_images.jsonl."""


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels after orientation, from the header alone.

    Raises: DecodeError if the bytes are not an image that can be read.
    """
    header = _jpeg_header(data)
    if header is not None:
        height, width, _ = header
        return (width, height) if jpeg_orientation(data) >= 5 else (height, width)
    with _open(data) as image:
        width, height, orientation = *image.size, _orientation(image, data)
        if image.format == "TIFF":  # early versions of Pillow turn the size only with the pixels
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            width, height, orientation = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT], tags.get(_EXIF_ORIENTATION, 1)
        return (width, height) if orientation >= 5 else (height, width)


class Header(NamedTuple):
    """What the header of an image file contains."""

    height: int
    """In pixels, after orientation."""
    width: int
    layout: JpegLayout | None
    """Of a baseline JPEG that is upright; None for all other files."""


def read_header(data: bytes) -> Header:
    """Size and layout from the header alone.   Raises: DecodeError as image_size does."""
    layout = read_layout(data)
    if layout is None or (layout.exif is not None and _tiff_orientation(data[slice(*layout.exif)]) != 1):
        return Header(*image_size(data), None)
    _refuse_bomb(layout.height, layout.width)
    return Header(layout.height, layout.width, layout)


def decode_box(
    data: bytes, header: Header, box: Sequence[int], offsets: Offsets | None = None, *, channels: int = 3
) -> Uint8Array:
    """Decode a box of an image.

    Args:   header: of this file.  box: (top, left, height, width) inside it.  offsets: of its restart tiles.
            channels: as in decode_image.
    Returns: (height, width, channels) uint8, the same pixels as in the whole image; usually not contiguous.
    Raises: DecodeError with a one-line reason.
    """
    top, left, height, width = box
    pixels = None
    if header.layout is not None:
        pixels = _decode_part(data, header.layout, box, offsets, _TURBO_MODES[MODES[channels]])
    if pixels is None:
        return decode_image(data, channels)[top : top + height, left : left + width]
    return pixels


def _decode_part(
    data: bytes, layout: JpegLayout, box: Sequence[int], offsets: Offsets | None, colorspace: str
) -> Uint8Array | None:
    """The box of a baseline JPEG, decoded with little around it; None if that fails."""
    top, left, height, width = box
    try:
        if offsets is not None:
            spliced, top, left = splice(data, layout, offsets, box)
            pixels = simplejpeg.decode_jpeg(spliced, colorspace=colorspace)
        elif (short := head(data, layout, top + height)) is not None:
            pixels = simplejpeg.decode_jpeg(short, colorspace=colorspace, strict=False)
        else:
            return None
    except ValueError:
        return None  # decoding the whole file will give the reason
    return pixels[top : top + height, left : left + width]


def decode_rgb(data: bytes) -> Uint8Array:
    """decode_image with three channels."""
    return decode_image(data, 3)


def decode_image(data: bytes, channels: int) -> Uint8Array:
    """Decode an image file.

    Args: data: the file's bytes, in any format that Pillow reads.  channels: a key of MODES: 1 grey, 3 RGB, 4 RGBA.
    Returns: (H, W, channels) uint8, contiguous unless it was turned by its orientation.
    Raises: DecodeError with a one-line reason.
    """
    mode = MODES[channels]
    header = _jpeg_header(data)
    if header is not None and header[2] in _TURBO_COLORSPACES:
        try:
            pixels = simplejpeg.decode_jpeg(data, colorspace=_TURBO_MODES[mode])
        except ValueError:
            pass  # Pillow tolerates some of libjpeg's warnings and has clearer messages for the others.
        else:
            return turn(pixels, jpeg_orientation(data))
    with _open(data) as image:
        orientation = _orientation(image, data)
        try:
            pixels = _pillow_pixels(image, mode)
        except Exception as error:  # Codecs raise whatever they like on damaged bytes.
            raise DecodeError(f"{image.format or 'image'} does not decode: {_one_line(error)}") from error
    return turn(pixels, orientation)


def has_alpha(data: bytes) -> bool:
    """Whether an image file has transparent parts, or could have.   Raises: DecodeError if it is no image."""
    if _jpeg_header(data) is not None:
        return False
    with _open(data) as image:
        return _has_alpha(image)


def has_colour(pixels: Uint8Array) -> bool:
    """Whether an image is more than grey.   Args: pixels: (H, W, 3) uint8 RGB."""
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    return bool((spread > _COLOUR_LEVELS).mean() > _COLOUR_SHARE)


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 where there is none or it is malformed.

    Walks the segments before the first scan, so its cost does not grow with the file.
    """
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA or marker == 0xD9:  # start of scan, end of image
            return 1
        length = (data[at + 2] << 8) | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            at = directory + 2 + 12 * entry
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, at)
            if tag == _EXIF_ORIENTATION:
                (value,) = struct.unpack_from(order + _EXIF_NUMBERS.get(kind, "H"), tiff, at + 8)
                return int(value) if kind in _EXIF_NUMBERS and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Height, width and colour space as stored, or None if libjpeg-turbo cannot read them."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _refuse_bomb(height, width)
    return height, width, colorspace


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data))
            _refuse_bomb(image.height, image.width)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:  # its words name an object in memory
        raise DecodeError("not an image that can be read: no known format") from error
    except Exception as error:  # Codecs raise whatever they like on damaged bytes.
        raise DecodeError(f"not an image that can be read: {_one_line(error)}") from error
    return image


def _refuse_bomb(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise DecodeError(f"the header says {width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS} pixels")


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation that is still to be applied to Pillow's pixels."""
    if data[:2] == b"\xff\xd8":
        return jpeg_orientation(data)
    if image.format == "TIFF":
        return 1  # Pillow turns these when it loads them, and no others
    if image.format == "PNG" and "Raw profile type exif" not in image.info:
        return _png_orientation(data)  # Pillow would decode the whole file in search of a later chunk
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # An image with damaged EXIF is still an image.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_orientation(data: bytes) -> int:
    """EXIF orientation of a PNG, from its chunk eXIf, which may follow the pixels."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            return _tiff_orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 12 + length
    return 1


def _pillow_pixels(image: Image.Image, mode: str) -> Uint8Array:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_image(np.asarray(image).astype(np.float64) / 257.0)
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        image = _grey_image(values * (255.0 if values.max() <= 1.0 else 1.0))
    elif _has_alpha(image):
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*_GROUND, 255)), image)
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):  # palettes and inks become grey as the colours that they are
        image = image.convert("RGB")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands()


def _grey_image(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def turn(pixels: Uint8Array, orientation: int) -> Uint8Array:
    """Apply an EXIF orientation to (H, W, C) pixels. Source: EXIF 2.3, tag 0x0112."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
