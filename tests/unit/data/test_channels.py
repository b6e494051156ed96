"""Sets of grey and of coloured images, and what is said of them for encoders of one and of three channels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mixmae.data.channels import check_channels, note_grey
from mixmae.data.source import DataError
from mixmae.data.sources import open_source


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of so many grey and so many coloured images, and opens it."""

    def write(grey: int, coloured: int):
        pixels = np.random.default_rng(0).integers(0, 256, (grey + coloured, 20, 30, 3), dtype=np.uint8)
        for number, values in enumerate(pixels):
            image = Image.fromarray(values)
            (image.convert("L") if number < grey else image).save(tmp_path / f"{number:03d}.png")
        (tmp_path / "broken.png").write_bytes(b"no image")
        return open_source(tmp_path)

    return write


def test_coloured_images_are_refused_for_one_channel(folder):
    source = folder(2, 5)
    with pytest.raises(DataError, match=r"5 of 7 images .* have colours, .* give --encoder.in-channels 3"):
        check_channels(source, 1)
    check_channels(source, 3)


def test_a_few_coloured_images_are_told(folder, capsys):
    check_channels(folder(6, 1), 1)
    assert "note: 1 of 7 images" in capsys.readouterr().out


def test_grey_images_in_three_channels_are_told(folder, capsys):
    source = folder(7, 0)
    check_channels(source, 1)
    note_grey(source, 1)
    assert capsys.readouterr().out == ""
    note_grey(source, 3)
    assert "all 7 images" in (text := capsys.readouterr().out)
    assert "--encoder.in-channels 1" in text


@pytest.mark.parametrize("counts", [(3, 4), (0, 0)])
def test_nothing_is_said_of_colours_in_three_channels_or_of_no_image(folder, capsys, counts):
    source = folder(*counts)
    note_grey(source, 3)
    check_channels(source, 3)
    if counts == (0, 0):
        check_channels(source, 1)
    assert capsys.readouterr().out == ""
