"""The splits of a collection: the words that name them, and the rows that are held out where there is no such word."""

from __future__ import annotations

import re

import numpy as np

from mixmae.data.source import DataError, RowRange, Source
from mixmae.data.sources.joined import JoinedSource, join

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev", "devel", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in names of files and folders that name a split, in any case. Several folders of one split are joined."""
SPLITS = tuple(SPLIT_WORDS)

_SPLIT_BY_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}


def split_of(relative: str) -> str | None:
    """The split in a file's name (train-00000-of-00004.parquet, set-val-1.tar) or its folder's (train/0.parquet)."""
    folder, _, base = relative.rpartition("/")
    for word in re.findall(r"[a-z]+", base.lower()):
        if word in _SPLIT_BY_WORD:
            return _SPLIT_BY_WORD[word]
    return split_of_folder(folder.rpartition("/")[2])


def split_of_folder(name: str) -> str | None:
    """The split that a folder's whole name stands for."""
    return _SPLIT_BY_WORD.get(name.lower())


def split_holdout(source: Source, num_rows: int) -> tuple[Source, Source]:
    """Cut the last rows off a source.

    A set that is stored by class gives a held-out part of few classes; make_shards shuffles, so its shards do not. Each
    of several sources gives its share. No copy of a held-out row, as weights make them, is trained on.

    Args: num_rows: at least 1, at most all stored images but one.
    Returns: what remains for training, what is held out.   Raises: DataError if num_rows is out of range.
    """
    stored = num_stored_images(source)
    if not 0 < num_rows < stored:
        raise DataError(f"cannot hold out {num_rows} of the {stored} images of {source.name}: choose 1 to all but one")
    if isinstance(source, JoinedSource):
        ends = source.part_index.starts
        counts = np.minimum(np.diff(ends * num_rows // stored), np.diff(ends) - 1).tolist()
        pairs = [
            split_holdout(part, count) if count else (part, None)
            for part, count in zip(source.parts, counts, strict=True)
        ]
        held = [held for _, held in pairs if held is not None]
        if held:
            return join([kept for kept, _ in pairs], source.weights), join(held, [1.0] * len(held), source)
    cut = source.num_rows - num_rows
    return RowRange(base=source, start=0, stop=cut), RowRange(base=source, start=cut, stop=source.num_rows)


def num_stored_images(source: Source) -> int:
    """Rows of a source without the copies that weights make."""
    return source.part_index.num_rows if isinstance(source, JoinedSource) else source.num_rows
