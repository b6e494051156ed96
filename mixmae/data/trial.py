"""Images that end the process which decodes them: found by decoding them in another process first.

Decoders are written in C: a damaged file may crash them, and a huge one may take so much memory that the system ends
the process. Ray starts a decoding task that has died again, without limit; it would die at the same image each time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import decode_image
from mixmae.data.source import Sample, Source

_TIMES = 2
"""An image must end so many processes: one may have ended for another reason."""


class TriedSource:
    """A source whose images are decoded in another process before they are handed out; those that end it are broken.

    They have empty data and their `problem`, like an image that cannot be read. In all else it is the other source.
    Call `close` to end the process; it ends with this one, too.
    """

    def __init__(self, source: Source, channels: int) -> None:
        """Args: channels: of the images, as in decode_image."""
        self._source, self._channels = source, channels
        self._process: Any = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Sample]:
        """As Source.read."""
        with self._lock:
            return [self._tried(sample) for sample in self._source.read(chunk, rows_in_chunk)]

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.join()
            self._connection = None

    def _tried(self, sample: Sample) -> Sample:
        how = ""
        for _ in range(_TIMES):
            if not (how := self._how_it_ends(sample.data)):
                return sample
        return replace(sample, data=b"", restart_offsets=None, problem=f"the process that decodes it ends ({how})")

    def _how_it_ends(self, data: bytes) -> str:
        """How a process ends that decodes the image; empty if it goes on."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(data)
            self._connection.recv()
        except (EOFError, OSError):
            self.close()
            status = self._process.exitcode
            return signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return ""

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have the locks of this process's threads
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._channels), daemon=True)
        self._process.start()
        other.close()  # or its end would not be noticed here
        try:
            self._connection.recv()  # it is ready: what ends it from now on is an image
        except EOFError as error:
            raise RuntimeError("the process for trying images did not start") from error


def _serve(connection: Connection, channels: int) -> None:
    """Decode what comes, until the other side closes the connection or ends."""
    connection.send(None)
    while True:
        try:
            data = connection.recv()
        except (EOFError, OSError):
            return
        with contextlib.suppress(Exception):  # an ordinary broken image: who decodes it in earnest says so
            decode_image(data, channels)
        connection.send(None)
