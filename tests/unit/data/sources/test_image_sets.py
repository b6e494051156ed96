"""Lists of splits as Pascal VOC has them, and as people write them."""

from __future__ import annotations

import pytest

from mixmae.data.account import Tally
from mixmae.data.sources.image_sets import read_image_sets
from mixmae.data.sources.storage import locate


def sets_of(folder, lists, usable="abc", there="abcd"):
    for name, text in lists.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    storage, path = locate(str(folder))
    tally = Tally()
    found = read_image_sets(storage, path, set(usable), set(there), tally)
    return found, {note.what: (note.count, note.example) for note in tally.notes}


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"train": "a\nb\n", "val": "c\n"}, {"train": ["a", "b"], "validation": ["c"]}),
        ({"train": "\ufeffa\r\n\r\na\r\n", "test": "c  1\r\n"}, {"train": ["a"], "test": ["c"]}),
        ({"trainval": "a\nb\nc\n", "val": "b\n"}, {"train": ["a", "c"], "validation": ["b"]}),
        ({"test": "b\n"}, {"train": ["a", "c"], "test": ["b"]}),
        ({}, {}),
    ],
)
def test_lists(tmp_path, lists, expected):
    assert sets_of(tmp_path, lists) == (expected, {})


def test_what_does_not_fit_is_named(tmp_path):
    found, notes = sets_of(tmp_path, {"train": "a\nnot here\n", "val": "a\n", "test": "d\n"})
    assert found == {"train": ["a"], "validation": ["a"]}
    assert notes == {
        "images that the lists of ImageSets name are not there": (1, "not here"),
        "lists of ImageSets name no image that is annotated": (1, "test.txt"),
        "images are in the lists of two splits, so that what is learnt from is judged, too": (1, "a"),
    }
