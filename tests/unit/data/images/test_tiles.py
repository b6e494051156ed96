"""Needs libjpeg-turbo's jpegtran for most of it, and scikit-image's photographs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from skimage import data as photographs

from mixmae.data.images import tiles
from mixmae.data.images.decode import DecodeError, decode_box, decode_rgb, read_header
from mixmae.data.images.tiles import head, read_layout, retile, splice

needs_tool = pytest.mark.skipif(tiles.tool_path() is None, reason="jpegtran (libjpeg-turbo-progs) is not installed")

SUBSAMPLINGS = ["420", "422", "440", "444", "Gray"]
SIZES = [(375, 500), (333, 485), (400, 496), (97, 161), (65, 63), (40, 17), (16, 48), (257, 33)]
"""Widths that cut into tiles well, badly (31 MCUs, a prime) and not at all; heights with every kind of last row."""


def picture(height: int, width: int) -> np.ndarray:
    """A part of a photograph, never smooth, so that an error at a tile's border shows."""
    pixels = photographs.astronaut()[60 : 60 + height, 5 : 5 + width].astype(np.int16)
    noise = np.random.default_rng(height * width).integers(-20, 21, size=pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def encoded(height: int, width: int, subsampling: str) -> bytes:
    pixels = picture(height, width)
    if subsampling == "Gray":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), colorspace="GRAY", quality=90)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), colorsubsampling=subsampling, quality=90)


def boxes_in(height: int, width: int, count: int) -> list[list[int]]:
    """Random boxes and those that touch every edge and corner."""
    random = np.random.default_rng(width)
    found = [[0, 0, height, width], [0, 0, 1, 1], [height - 1, width - 1, 1, 1], [0, width // 2, height, 1]]
    for _ in range(count):
        h, w = (int(random.integers(1, side + 1)) for side in (height, width))
        found.append([int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w])
    return found


@needs_tool
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", SIZES)
def test_any_box_of_tiles_is_bit_exact(subsampling, size):
    data = encoded(*size, subsampling)
    whole = decode_rgb(data)
    made = retile(data)
    if made is None:
        assert size == (40, 17) or size == (16, 48)
        return
    tiled, offsets = made
    assert np.array_equal(decode_rgb(tiled), whole)
    layout = read_layout(tiled)
    for box in boxes_in(*size, 40):
        spliced, top, left = splice(tiled, layout, offsets, box)
        pixels = simplejpeg.decode_jpeg(spliced)[top : top + box[2], left : left + box[3]]
        assert np.array_equal(pixels, whole[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]), box


@needs_tool
def test_a_small_box_is_a_small_file_that_any_decoder_reads():
    tiled, offsets = retile(encoded(400, 496, "420"))
    spliced, top, left = splice(tiled, read_layout(tiled), offsets, [100, 200, 64, 64])
    assert len(spliced) < len(tiled) / 8
    pixels = np.asarray(Image.open(io.BytesIO(spliced)))[top : top + 64, left : left + 64]
    assert np.array_equal(pixels, decode_rgb(tiled)[100:164, 200:264])


@needs_tool
def test_markers_wrap_around_more_than_the_table_holds(monkeypatch):
    monkeypatch.setattr(tiles, "_CYCLE", tiles._CYCLE[:8])
    data = encoded(333, 485, "444")
    tiled, offsets = retile(data)
    spliced, top, left = splice(tiled, read_layout(tiled), offsets, [3, 9, 300, 400])
    pixels = simplejpeg.decode_jpeg(spliced)[top : top + 300, left : left + 400]
    assert np.array_equal(pixels, decode_rgb(data)[3:303, 9:409])


@needs_tool
def test_metadata_stays_in_the_file_and_out_of_the_splice():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 100
    Image.fromarray(picture(200, 320)).save(stream, "JPEG", exif=exif, icc_profile=b"x" * 3000, comment=b"why")
    tiled, offsets = retile(stream.getvalue())
    assert Image.open(io.BytesIO(tiled)).getexif()[0x010E] == exif[0x010E]
    spliced, top, left = splice(tiled, read_layout(tiled), offsets, [50, 60, 20, 30])
    assert b"description" not in spliced
    pixels = simplejpeg.decode_jpeg(spliced)[top : top + 20, left : left + 30]
    assert np.array_equal(pixels, decode_rgb(stream.getvalue())[50:70, 60:90])


@pytest.mark.parametrize("options", [{"progressive": True}, {"mode": "CMYK"}, {"format": "PNG"}, {"cut": 3000}])
def test_what_cannot_be_tiled_stays_as_it_is(options):
    stream = io.BytesIO()
    image = Image.fromarray(picture(120, 200)).convert(options.pop("mode", "RGB"))
    cut = options.pop("cut", None)
    image.save(stream, options.pop("format", "JPEG"), **options)
    assert retile(stream.getvalue()[:cut]) is None


def test_without_the_tool_files_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(tiles, "tool_path", lambda: None)
    assert retile(encoded(120, 200, "420")) is None


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("tiled", [False, pytest.param(True, marks=needs_tool)])
def test_decode_box_gives_the_pixels_of_the_whole(subsampling, tiled):
    data, offsets = encoded(301, 333, subsampling), None
    whole = decode_rgb(data)
    if tiled:
        data, offsets = retile(data)
    header = read_header(data)
    for box in boxes_in(301, 333, 40):
        top, left, height, width = box
        pixels = decode_box(data, header, box, offsets)
        assert np.array_equal(pixels, whole[top : top + height, left : left + width]), box


@needs_tool
def test_offsets_of_another_file_do_no_harm():
    data, offsets = retile(encoded(375, 500, "420"))
    _, others = retile(encoded(375, 500, "422"))
    header, whole = read_header(data), decode_rgb(data)
    for wrong in (others, offsets[:-1], offsets + np.uint32(1), offsets[::-1].copy(), np.zeros_like(offsets)):
        assert np.array_equal(decode_box(data, header, [30, 40, 50, 60], wrong), whole[30:80, 40:100])
    plain = encoded(375, 500, "420")
    assert np.array_equal(decode_box(plain, read_header(plain), [30, 40, 50, 60], offsets), whole[30:80, 40:100])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_is_cut_as_it_stands(orientation):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(200, 320)).save(stream, "JPEG", exif=exif)
    data = stream.getvalue()
    made = retile(data)
    for file, offsets in [(data, None)] + ([made] if made else []):
        pixels = decode_box(file, read_header(file), [10, 20, 100, 150], offsets)
        assert np.array_equal(pixels, decode_rgb(data)[10:110, 20:170])


def test_a_file_without_its_end_is_broken_even_above_the_damage():
    data = encoded(375, 500, "420")
    header = read_header(data)
    assert head(data, header.layout, 100) is not None
    for cut in (data[: len(data) // 2], data[:-2]):
        assert head(cut, header.layout, 100) is None
    with pytest.raises(DecodeError):
        decode_box(data[: len(data) // 2], header, [0, 0, 100, 100])


def test_a_walk_over_nonsense_ends():
    data = encoded(120, 200, "420")
    for at in range(2, 700):
        read_layout(data[:at])
        read_layout(data[:at] + bytes([255 - data[at]]) + data[at + 1 :])
    assert read_layout(b"\xff\xd8\xff\xff\xff\xff") is None
