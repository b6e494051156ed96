"""A source with one image that ends the process which decodes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mixmae.data.chunks import Int64Array
from mixmae.data.source import Sample, Source


class DeadlyImage(bytes):
    """An image file that ends the process which looks into it, as one does that crashes a decoder."""

    def __getitem__(self, key: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DeadlySource:
    """Another source, one row of which is deadly: `once`, `always`, or `broken`, which kills nobody.

    The file `mark` appears when the image was read first.
    """

    source: Source
    row: int
    when: Literal["once", "always", "broken"]
    mark: str

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        """As Source.read."""
        first = int(self.source.chunks.starts[chunk])
        read = zip(rows_in_chunk, self.source.read(chunk, rows_in_chunk), strict=True)
        return [self._spoiled(sample) if first + int(row) == self.row else sample for row, sample in read]

    def _spoiled(self, sample: Sample) -> Sample:
        is_first = mark(self.mark)
        if self.when == "once" and not is_first:
            return sample
        data = b"no image" if self.when == "broken" else DeadlyImage(sample.data)
        return replace(sample, data=data)


def mark(path: str) -> bool:
    """Leave a mark; returns whether it is the first one there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
