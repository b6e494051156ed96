"""Needs Pillow and simplejpeg; files are made here, in every odd format that collections hold."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from mixmae.data.images import decode
from mixmae.data.images.decode import (
    DecodeError,
    decode_box,
    decode_image,
    decode_rgb,
    has_colour,
    image_size,
    read_header,
)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    low = np.random.default_rng(0).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((60, 40), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 2, "quality": 60}])
def test_jpegs_decode_as_pillow_decodes_them(picture, options):
    data = encoded(picture, "JPEG", **options)
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_size(data) == (40, 60)


def test_grey_jpeg(picture):
    pixels = decode_rgb(encoded(picture.convert("L"), "JPEG"))
    assert pixels.shape == (40, 60, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpeg_keeps_its_colours(picture):
    data = encoded(picture.convert("CMYK"), "JPEG", quality=95)
    difference = np.abs(decode_rgb(data).astype(int) - np.asarray(picture))
    assert difference.mean() < 6


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats(picture, format):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture, format, **options)
    tolerance = 12 if format == "GIF" else 0
    assert np.abs(decode_rgb(data).astype(int) - np.asarray(picture)).mean() <= tolerance
    assert image_size(data) == (40, 60)


def test_alpha_lies_on_white():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 255, 128))
    pixels = decode_rgb(encoded(image, "PNG"))
    assert list(pixels[0, 0]) == [0, 0, 255]
    assert np.abs(pixels[0, 1].astype(int) - [127, 127, 255]).max() <= 1
    assert list(pixels[1, 3]) == [255, 255, 255]


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 200, 30, 99, 99, 99])
    image.putdata([0, 1, 2])
    pixels = decode_rgb(encoded(image, "PNG", transparency=2))
    assert pixels.tolist() == [[[0, 0, 0], [10, 200, 30], [255, 255, 255]]]


def test_grey_with_alpha():
    image = Image.new("LA", (2, 1), (50, 255))
    image.putpixel((1, 0), (50, 0))
    assert decode_rgb(encoded(image, "PNG")).tolist() == [[[50] * 3, [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    pixels = decode_rgb(encoded(Image.fromarray(values), format))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_1_bit_and_float():
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode_rgb(encoded(bits, "PNG"))[0, :, 0].tolist() == [255, 0]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert decode_rgb(encoded(floats, "TIFF"))[0, :, 1].tolist() == [0, 128, 255]


def test_first_frame_of_an_animation(picture):
    data = encoded(picture.convert("L"), "GIF", save_all=True, append_images=[Image.new("L", picture.size)])
    assert decode_rgb(data).mean() > 30


def test_one_pixel():
    for format in ("JPEG", "PNG"):
        data = encoded(Image.new("RGB", (1, 1), (128, 128, 128)), format)
        assert decode_rgb(data).tolist() == [[[128, 128, 128]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["JPEG", "CMYK JPEG", "PNG"])
def test_orientation_is_applied_on_both_paths(picture, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = picture.convert("CMYK") if mode == "CMYK JPEG" else picture
    data = encoded(source, mode.split()[-1], exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    pixels = decode_rgb(data)
    assert np.array_equal(pixels, np.asarray(expected))
    assert image_size(data) == pixels.shape[:2]


def test_damaged_exif_does_not_cost_the_picture(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(picture, "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start + 4 : start + 8] = b"\xff\xff\xff\x7f"
    assert decode_rgb(bytes(data)).shape == (40, 60, 3)


def broken_files() -> dict[str, bytes]:
    low = np.random.default_rng(1).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(low, quality=90)
    png = encoded(Image.fromarray(low), "PNG")
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>" * 20,
        "jpeg cut in the scan": jpeg[: len(jpeg) // 2],
        "jpeg cut in the header": jpeg[:100],
        "png cut": png[: len(png) // 2],
        "png with a damaged stream": png[:43] + b"\xff" * 200 + png[243:],
    }


@pytest.mark.parametrize("kind", broken_files())
def test_broken_files_give_a_reason(kind):
    with pytest.raises(DecodeError) as caught:
        decode_rgb(broken_files()[kind])
    assert 5 < len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch, picture):
    monkeypatch.setattr(decode, "MAX_PIXELS", 2399)
    for format in ("JPEG", "PNG"):
        data = encoded(picture, format)
        for function in (decode_rgb, image_size):
            with pytest.raises(DecodeError, match="60 x 40 pixels are more"):
                function(data)


def test_a_huge_png_header_is_refused():
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(DecodeError):
        decode_rgb(bytes(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_grey_files_stay_grey(picture, format):
    grey = picture.convert("L")
    data = encoded(grey, format)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, 1)[..., 0], stored)
    assert np.array_equal(decode_image(data, 4)[..., 0], stored)
    assert not has_colour(decode_rgb(data))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_one_channel_of_16_bits_is_scaled(format):
    data = encoded(Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16)), format)
    assert decode_image(data, 1).tolist() == [[[0], [1], [128], [255]]]


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_colours_become_their_luminance(picture, mode):
    data = encoded(picture.convert(mode), "TIFF")
    assert np.array_equal(decode_image(data, 1)[..., 0], np.asarray(Image.fromarray(decode_rgb(data)).convert("L")))
    assert has_colour(decode_rgb(data))


def test_alpha_in_one_channel_and_in_four():
    image = Image.new("LA", (2, 1), (50, 255))
    image.putpixel((1, 0), (50, 0))
    data = encoded(image, "PNG")
    assert decode_image(data, 1).tolist() == [[[50], [255]]]
    assert decode_image(data, 4).tolist() == [[[50, 50, 50, 255], [50, 50, 50, 0]]]
    data = encoded(Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "PNG")
    assert decode_image(data, 1).tolist() == [[[255]]]
    assert decode_image(data, 4).tolist() == [[[10, 20, 30, 0]]]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_box_has_the_pixels_of_the_whole(picture, channels):
    data = encoded(picture, "JPEG")
    whole = decode_image(data, channels)
    box = decode_box(data, read_header(data), (3, 4, 10, 12), channels=channels)
    assert np.array_equal(box, whole[3:13, 4:16])
    assert whole.shape == (40, 60, channels)
    if channels == 4:
        assert (whole[..., 3] == 255).all()


def test_a_grey_jpeg_that_was_stored_in_colour_has_none(picture):
    grey = picture.convert("L").convert("RGB")
    assert not has_colour(decode_rgb(encoded(grey, "JPEG", quality=50)))
    grey.paste((200, 30, 30), (0, 0, 5, 5))  # 1 % of the pixels
    assert has_colour(decode_rgb(encoded(grey, "PNG")))


def turned(orientation: int, file_format: str, **options: object) -> bytes:
    """A picture of 100 x 60 px with a red corner top left, stored with an orientation."""
    pixels = np.full((60, 100, 3), 90, np.uint8)
    pixels[:20, :30] = 255, 0, 0
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, file_format, exif=exif, **options)
    return out.getvalue()


RED_CORNER = {
    **{1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"},
    **{5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"},
}
"""Where the first pixel is to be seen.   Source: EXIF 2.3, tag 0x0112."""


@pytest.mark.parametrize("orientation", RED_CORNER)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        *[("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("AVIF", {"quality": 90})],
        *[("TIFF", {"compression": kind}) for kind in (None, "tiff_lzw", "packbits", "jpeg")],
    ],
)
def test_every_format_is_turned_upright_once(orientation, file_format, options):
    data = turned(orientation, file_format, **options)
    pixels = decode_rgb(data)
    size = (100, 60) if orientation >= 5 else (60, 100)
    assert pixels.shape[:2] == size == image_size(data) == read_header(data)[:2]
    corners = {"top left": pixels[:8, :8], "top right": pixels[:8, -8:]}
    corners |= {"bottom left": pixels[-8:, :8], "bottom right": pixels[-8:, -8:]}
    red = [name for name, corner in corners.items() if corner[..., 0].mean() > 200 and corner[..., 1].mean() < 60]
    assert red == [RED_CORNER[orientation]]
    box = decode_box(data, read_header(data), (10, 20, 30, 25))
    assert np.abs(box.astype(int) - pixels[10:40, 20:45]).max() <= 2  # JPEG's edges


def test_orientations_that_are_written_oddly():
    png = turned(6, "PNG")
    chunks, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at : at + 12 + length])
        at += 12 + length
    exif = next(chunk for chunk in chunks if chunk[4:8] == b"eXIf")
    rest = [chunk for chunk in chunks if chunk is not exif]
    behind = png[:8] + b"".join([*rest[:-1], exif, rest[-1]])  # after the pixels
    assert image_size(behind) == decode_rgb(behind).shape[:2] == (100, 60)
    jpeg = turned(6, "JPEG")
    entry = jpeg.index(struct.pack(">HHI", 0x0112, 3, 1))
    for kind, value in ((4, struct.pack(">I", 6)), (1, b"\6\0\0\0")):  # a long or a byte instead of a short
        written = jpeg[:entry] + struct.pack(">HHI", 0x0112, kind, 1) + value + jpeg[entry + 12 :]
        assert image_size(written) == decode_rgb(written).shape[:2] == (100, 60)
