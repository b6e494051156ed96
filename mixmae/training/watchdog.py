"""Notices a process that stands still: no batch comes, or no step ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

LEAST_S = 600.0
"""A shorter silence is never a fault: a store may be slow, a compiler long."""
_TIMES = 20
"""And so many times the usual time between two signs of life is none."""


class Watchdog:
    """Ends this process when it gives no sign of life for too long, after writing where each of its threads stands.

    A worker that has died is started again from its last checkpoint; one that waits for ever would wait for ever.

    Args:
        stacks: file for the stacks of all threads.
        report: gets one line before the end.
        least_s: shortest silence that counts.
        end: ends the process.
    """

    def __init__(
        self,
        stacks: Path,
        report: Callable[[str], None],
        *,
        least_s: float | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._stacks, self._report, self._least_s, self._end = stacks, report, least_s or LEAST_S, end
        self._last = time.monotonic()
        self._gaps: deque[float] = deque(maxlen=50)
        self._paused = 0
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A sign of life."""
        now = time.monotonic()
        self._gaps.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is expected while the context is open: evaluations take as long as they take."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._last = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._least_s / 4)):
            limit = max(self._least_s, _TIMES * (statistics.median(self._gaps) if self._gaps else 0.0))
            silent = time.monotonic() - self._last
            if silent > limit and not self._paused:
                with contextlib.suppress(OSError), self._stacks.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                with contextlib.suppress(Exception):
                    self._report(
                        f"no batch and no step for {silent:.0f} s; where its threads stand is in {self._stacks}"
                    )
                self._end(1)
                return
