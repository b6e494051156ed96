"""Broken images by name, and sets of which hardly any image decodes."""

from __future__ import annotations

import pytest

from mixmae.data.blocks import BrokenRecord
from mixmae.data.broken import check_decoding, find_broken, name_broken
from mixmae.data.source import DataError, RowRange
from mixmae.data.sources import open_source
from mixmae.training.loop import LoopConfig

IS_HOPELESS = LoopConfig().is_hopeless


def records(count: int) -> list[BrokenRecord]:
    return [BrokenRecord(row, f"{row}.jpg", "the file is empty") for row in range(count)]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (name_broken(records(1), 9), "1 of 9 images could not be used (0.jpg: the file is empty)"),
        (name_broken(records(1)), "1 image could not be used (0.jpg: the file is empty)"),
        (
            name_broken(records(2), 9, count=7),
            "7 of 9 images could not be used (0.jpg: the file is empty; 1.jpg: the file is empty; and 4 more)",
        ),
    ],
)
def test_the_sentence(sentence, expected):
    assert sentence == expected
    assert name_broken(records(5), 9).endswith("2.jpg: the file is empty; and 2 more)")


def test_broken_rows_are_found(write_shards):
    source = open_source(write_shards(20, 10, damaged={3: b"x", 25: b""}))
    assert [record.row for record in find_broken(source, [25, 4, 3])] == [25, 3]
    assert find_broken(source, range(25, 26))[0].reason == "the file is empty"


def test_a_set_of_which_hardly_any_image_decodes_is_refused(write_shards):
    """The last rows of each chunk are whole: what is looked at is spread over the set."""
    damaged = {row: b"x" for row in range(200) if row % 100 < 90}
    source = open_source(write_shards(100, 100, damaged=damaged))
    with pytest.raises(DataError, match=r"28 of 32 images of .* could not be used, for example .*#0 / .*stats\.py"):
        check_decoding(source, IS_HOPELESS)
    with pytest.raises(DataError, match=r"1 of 1 images"):
        check_decoding(RowRange(base=source, start=4, stop=5), IS_HOPELESS)
    check_decoding(source, LoopConfig(max_broken_fraction=0.9).is_hopeless)


def test_a_few_broken_images_are_no_hindrance(write_shards):
    check_decoding(open_source(write_shards(100, damaged={0: b"", 99: b""})), IS_HOPELESS)
