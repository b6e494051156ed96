"""What ends a run while it trains: SIGINT and SIGTERM, after a checkpoint, and the loss of its folder, at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from types import FrameType
from typing import Any

from mixmae.training.failures import FolderLost, Interrupted

GRACE_S = 90.0
"""A run that has not ended so long after it was asked to is left."""
OWNER_LOOK_S = 5.0
"""Between two looks at whose the folder is."""
_LOOK_S = 0.2


class StopRequest:
    """Whether somebody has asked this process to end, or it has to."""

    def __init__(self, may_write: Callable[[], bool] = lambda: True) -> None:
        """Args: may_write: whether the run still has its folder."""
        self._may_write, self._looked = may_write, time.monotonic()
        self.signal = 0
        """Number of the first signal; 0: none has come."""
        self.times = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        self.signal = self.signal or number
        self.times += 1

    def run(self, work: Callable[[], Any], mailbox: Any, heard: Set[str]) -> Any:
        """Do the work in a thread while signals are listened to in this one.

        Args:   mailbox: tells the workers to save and to end.  heard: kinds of messages that have come from them:
                before they have started there is nothing to save.
        Raises: Interrupted where there is nothing to wait for, at a second signal, and after GRACE_S; FolderLost.
        """
        result: list[Any] = []
        failure: list[BaseException] = []

        def do() -> None:
            try:
                result.append(work())
            except BaseException as error:  # handed over
                failure.append(error)

        thread = threading.Thread(target=do, name="fit", daemon=True)
        thread.start()
        deadline = None
        while thread.is_alive():
            thread.join(_LOOK_S)
            self._look_at_owner()
            if not self.signal:
                continue
            if "started" not in heard or self.times > 1 or (deadline and time.monotonic() > deadline):
                raise Interrupted(self.signal)
            if deadline is None:
                deadline = time.monotonic() + GRACE_S
                print("\nStopping: a checkpoint is made first; once more to stop at once.", flush=True)
                mailbox.request_stop.remote()
        if failure:
            if self.signal:  # Ray's processes, which had the signal too
                raise Interrupted(self.signal) from failure[0]
            raise failure[0]
        return result[0]

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until a signal.   Raises: Interrupted, FolderLost."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.signal:
            self._look_at_owner()
            time.sleep(min(_LOOK_S, max(0.0, end - time.monotonic())))
        if self.signal:
            raise Interrupted(self.signal)

    def _look_at_owner(self) -> None:
        if time.monotonic() < self._looked + OWNER_LOOK_S:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # storage that is away, or a damaged file, says nothing
            if not self._may_write():
                raise FolderLost


@contextlib.contextmanager
def signals(may_write: Callable[[], bool] = lambda: True) -> Iterator[StopRequest]:
    """Listen to SIGINT and SIGTERM while the context is open; a process's main thread alone can.

    Args: may_write: whether the run still has its folder.
    """
    request = StopRequest(may_write)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
