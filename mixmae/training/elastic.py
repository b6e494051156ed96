"""How many workers each start of a run has, where it may have several numbers, and when it is started again with more.

A run is started again after each failure, with as many workers as the cluster has room for then: one that has lost a
node goes on with fewer. If there is room for more later, it saves, ends its workers and starts new ones, without loss.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Set
from typing import Any

from mixmae.share import WorkerRange
from mixmae.training.cluster import room, room_beside
from mixmae.training.failures import WorkersFailed

SETTLE_S = 10.0
"""The room is taken as it is when it has stayed the same for so long: what failed workers had comes back in seconds."""
PATIENCE_S = 6 * 3600.0
"""Preempted nodes come back, after hours perhaps; nobody has to watch for it."""
LOOK_S = 5.0
"""Between two looks for more room."""
STEADY_S = 60.0
"""Room must have been there for so long, in all looks."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 600.0, 7200.0
"""Between a start and the next one with more workers. It doubles when the larger group has failed within it, or was no
larger in the end, so that a node that comes and goes does not take the run with it."""


class Growth:
    """When a run is started again with more workers.   Args: clock: of seconds, for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = FIRST_PAUSE_S
        self._count, self._started = 0, clock()
        self._there_since: float | None = None
        self._before: int | None = None
        """Workers of the group before, if this one was to be larger."""

    def started(self, count: int) -> None:
        """Take note of a start with so many workers."""
        if self._before is not None and count <= self._before:
            self._lengthen()
        self._count, self._started, self._there_since = count, self._clock(), None

    def wants(self, is_room: bool) -> bool:
        """Whether to start again with more now.   Args: is_room: for more that would make the steps shorter."""
        now = self._clock()
        if not is_room:
            self._there_since = None
            return False
        if self._there_since is None:
            self._there_since = now
        if now < self._there_since + STEADY_S or now < self._started + self._pause_s:
            return False
        self._before = self._count
        return True

    def failed(self) -> None:
        """Take note that the workers have failed."""
        if self._before is not None and self._clock() < self._started + self._pause_s:
            self._lengthen()
        else:
            self._pause_s = FIRST_PAUSE_S
        self._before = None

    def _lengthen(self) -> None:
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


class Elastic:
    """The numbers of workers of one run.

    Args:
        workers: which they may be.
        use_gpu: whether each has a GPU.
        num_blocks: parts of a batch that are dealt to the workers (mixmae.share).
        note: gets one line for people.
        clock: of seconds, for tests.
    """

    def __init__(
        self,
        workers: WorkerRange,
        *,
        use_gpu: bool,
        num_blocks: int,
        note: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._use_gpu, self._num_blocks = workers, use_gpu, num_blocks
        self._note, self._clock, self._growth = note, clock, Growth(clock)
        self.count = workers.most
        """Workers of this start."""
        self.grows = False
        """Whether this group was asked to end because there is room for more."""

    def choose(self, sleep: Callable[[float], None]) -> int:
        """Choose the number of the next start: as many as there is room for, after waiting for the least.

        Args: sleep: for so many seconds; it may raise.
        Raises: WorkersFailed if there is no room for the least number for PATIENCE_S.
        """
        self.grows = False
        if self._workers.is_elastic:
            self.count = self._wait_for_room(sleep)
            self._growth.started(self.count)
        return self.count

    def _wait_for_room(self, sleep: Callable[[float], None]) -> int:
        least, most = self._workers.least, self._workers.most
        begun = since = self._clock()
        seen, is_told = -1, False
        while True:
            there, now = min(most, room(use_gpu=self._use_gpu)), self._clock()
            if there != seen:
                seen, since = there, now
            is_settled = now >= since + SETTLE_S
            if there == most or (there >= least and is_settled):
                return there
            line = f"the cluster has room for {there} workers, and --workers {self._workers} asks for at least {least}"
            if now > begun + PATIENCE_S:
                raise WorkersFailed(f"after {PATIENCE_S / 3600:.0f} hours {line}")
            if there < least and is_settled and not is_told:
                is_told = True
                self._note(f"{line}: waiting for nodes")
            sleep(1.0)

    @contextlib.contextmanager
    def watching(self, mailbox: Any, heard: Set[str]) -> Iterator[None]:
        """Look for room for more workers while the context is open, and ask this group to save and end if there is.

        Args: mailbox: of the workers.  heard: kinds of messages that have come from them.
        """
        if self.count >= self._workers.most:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(LOOK_S):
                if "started" in heard:
                    with contextlib.suppress(Exception):  # of a cluster that does not answer now
                        self._look(mailbox)

        thread = threading.Thread(target=watch, name="room", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=30)

    def _look(self, mailbox: Any) -> None:
        if not self.grows:
            there = max(self.count, min(self._workers.most, room_beside(self.count, use_gpu=self._use_gpu)))
            if not self._growth.wants(self._blocks_each(there) < self._blocks_each(self.count)):
                return
            self.grows = True
            self._note(f"there is room for {there} workers: saving, and starting again with more than {self.count}")
        mailbox.request_stop.remote()  # each time: a mailbox that has died forgets it

    def _blocks_each(self, count: int) -> int:
        """Blocks of the worker that has the most of them."""
        return -(-self._num_blocks // count)

    def failed(self) -> None:
        """Take note that the workers have failed."""
        self._growth.failed()
