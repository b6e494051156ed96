"""The classes of all rows of a collection, read without its images."""

from __future__ import annotations

from mixmae.data.order import Int64Array
from mixmae.data.source import RowRange, Source
from mixmae.data.sources.folders import FilesSource
from mixmae.data.sources.joined import JoinedSource
from mixmae.data.sources.parquet import ParquetSource
from mixmae.data.sources.tars import TarSource


def read_labels(source: Source) -> Int64Array:
    """Give the class index of every row: (num_rows,) int64 in storage order, below 0 where there is none."""
    if isinstance(source, RowRange):
        return read_labels(source.base)[source.start : source.stop]
    if isinstance(source, JoinedSource):
        return source.join_labels([read_labels(part) for part in source.parts])
    if isinstance(source, ParquetSource):
        return source.read_label_column()
    assert isinstance(source, (FilesSource, TarSource)), type(source)
    return source.labels
