"""From an image file's bytes to RGB pixels, with one set of rules for every format.

simplejpeg (libjpeg-turbo) decodes plain JPEGs, grey or colour; Pillow decodes everything else and what simplejpeg
refuses. Both give the same pixels for the same JPEG. The rules:
- Orientation: the EXIF orientation is applied, so an image is upright as it was photographed. (MAE's and MixMIM's
  loaders ignore it, which differs for a handful of ImageNet files.)
- Alpha, in palettes too: composited on white.
- CMYK: Pillow's conversion, which knows Adobe's inverted inks.
- 16-bit grey (modes I and I;16): divided by 257. Float: [0, 1] is stretched to 255 if nothing exceeds 1.
- Animations and multi-page files: the first frame.
- Strictness: a file that ends too early is broken, even if part of it could be shown.

Training needs a box of each image: `read_header` and then `decode_box`, which decodes as little of the file as its
layout allows (tiles.py) and gives the same pixels as decode_rgb.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mixmae.data.images.tiles import JpegLayout, Offsets, head, read_layout, splice

Uint8Array = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""A file with more pixels counts as broken, because it could fill the memory. Source: Pillow's limit."""

_TURBO_COLORSPACES = frozenset({"YCbCr", "RGB", "Gray"})
_GROUND = (255, 255, 255)
_EXIF_ORIENTATION = 0x0112


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
        width, height = image.size
        return (width, height) if _orientation(image, data) >= 5 else (height, width)


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


def decode_box(data: bytes, header: Header, box: Sequence[int], offsets: Offsets | None = None) -> Uint8Array:
    """Decode a box of an image.

    Args:   header: of this file.  box: (top, left, height, width) inside it.  offsets: of its restart tiles.
    Returns: (height, width, 3) uint8 RGB, the same pixels as in the whole image; usually not contiguous.
    Raises: DecodeError with a one-line reason.
    """
    top, left, height, width = box
    pixels = _decode_part(data, header.layout, box, offsets) if header.layout is not None else None
    if pixels is None:
        return decode_rgb(data)[top : top + height, left : left + width]
    return pixels


def _decode_part(data: bytes, layout: JpegLayout, box: Sequence[int], offsets: Offsets | None) -> Uint8Array | None:
    """The box of a baseline JPEG, decoded with little around it; None if that fails."""
    top, left, height, width = box
    try:
        if offsets is not None:
            spliced, top, left = splice(data, layout, offsets, box)
            pixels = simplejpeg.decode_jpeg(spliced, colorspace="RGB")
        elif (short := head(data, layout, top + height)) is not None:
            pixels = simplejpeg.decode_jpeg(short, colorspace="RGB", strict=False)
        else:
            return None
    except ValueError:
        return None  # decoding the whole file will give the reason
    return pixels[top : top + height, left : left + width]


def decode_rgb(data: bytes) -> Uint8Array:
    """Decode an image file.

    Args: data: the file's bytes, in any format that Pillow reads.
    Returns: (H, W, 3) uint8 RGB, contiguous unless it was turned by its orientation.
    Raises: DecodeError with a one-line reason.
    """
    header = _jpeg_header(data)
    if header is not None and header[2] in _TURBO_COLORSPACES:
        try:
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # Pillow tolerates some of libjpeg's warnings and has clearer messages for the others.
        else:
            return _turn(pixels, jpeg_orientation(data))
    with _open(data) as image:
        orientation = _orientation(image, data)
        try:
            pixels = _pillow_rgb(image)
        except Exception as error:  # Codecs raise whatever they like on damaged bytes.
            raise DecodeError(f"{image.format or 'image'} does not decode: {_one_line(error)}") from error
    return _turn(pixels, orientation)


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
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION:
                return int(value) if kind == 3 and count == 1 and 1 <= value <= 8 else 1
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
    if data[:2] == b"\xff\xd8":
        return jpeg_orientation(data)
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # Pillow would decode the whole file in search of a later chunk, and hide its damage.
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # An image with damaged EXIF is still an image.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _pillow_rgb(image: Image.Image) -> Uint8Array:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.float64) / 257.0, 0, 255)
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        grey = np.clip(values * (255.0 if values.max() <= 1.0 else 1.0), 0, 255)
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands():
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*_GROUND, 255))
        return np.array(Image.alpha_composite(ground, layer).convert("RGB"))
    return np.array(image.convert("RGB"))


def _turn(pixels: Uint8Array, orientation: int) -> Uint8Array:
    """Apply an EXIF orientation to (H, W, 3) pixels. Source: EXIF 2.3, tag 0x0112."""
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
