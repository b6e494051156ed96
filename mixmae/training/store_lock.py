"""The lock on a run's folder in a store: as mixmae.lock, without what only a filesystem can do.

run.lock there is the same JSON object. To take it, a process sees that nobody living has it, writes itself as the next
owner, waits, and reads back whether it still is: of several at one moment the last one that wrote has it. A heartbeat
reads before it writes: who is not the owner any more has lost it.

pyarrow writes to no store under a condition. So what cannot be excluded is a process whose write, on its way to the
store, takes longer than SETTLE_S: then two believe for up to a heartbeat that they have it, until the one that was
written over reads that. Meanwhile both may write checkpoints, whose digests tell if their files were mixed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from mixmae.lock import Hold, LockError, Owner, dump, held, is_moving, now, parse, refuse_living, this_process
from mixmae.training.run_store import RunStore

LOCK_NAME = "run.lock"
HEARTBEAT_S = 15.0
WATCH_S = 60.0
"""A heartbeat elsewhere that stands still for as long is a dead run's."""
SETTLE_S = 3.0


class StoreLock:
    """A lock that this process holds, until `release`; a thread of its own keeps the heartbeat."""

    def __init__(self, store: RunStore, owner: Owner, heartbeat_s: float) -> None:
        self.hold = Hold(store.local, owner.generation, store)
        self.is_lost = False
        self._store, self._owner, self._heartbeat_s = store, owner, heartbeat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store lock heartbeat", daemon=True)
        self._thread.start()

    def is_ours(self) -> bool:
        """Whether this process still holds the folder, as far as it knows."""
        return not (self.is_lost or self._done.is_set())

    def release(self) -> None:
        """Give the folder back; nothing if that was done, or if another run has taken it."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._write(replace(self._owner, heartbeat=now(), released=now()))
        held.pop(self._store.uri, None)

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat_s) and not self.is_lost:
            with contextlib.suppress(OSError):  # the store may be back at the next one
                self._write(replace(self._owner, heartbeat=now()))

    def _write(self, owner: Owner) -> None:
        current = read_owner(self._store)
        self.is_lost = self.is_lost or current is None or current.token != self._owner.token
        if not self.is_lost:
            self._store.write(LOCK_NAME, dump(owner))


def take(
    store: RunStore,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    watch_s: float = WATCH_S,
    settle_s: float = SETTLE_S,
    say: Callable[[str], None] = print,
) -> StoreLock:
    """Take the lock of a run's folder in a store; a process that has it gets it once more.

    Raises: InUse if a run that lives has it; LockError if it is damaged; StoreError.
    """
    before = held.get(store.uri)
    if isinstance(before, StoreLock) and before.is_ours():
        return before
    while True:
        last = read_owner(store)
        if last is not None:
            refuse_living(last, store.shown, lambda: store.read(LOCK_NAME), watch_s, say)
        owner = this_process(generation=last.generation + 1 if last else 1)
        store.write(LOCK_NAME, dump(owner))
        time.sleep(settle_s)
        current = read_owner(store)
        if current is not None and current.token == owner.token:
            break
    if last is not None and not last.is_released:
        say(f"note: the lock of {last.name}, which is gone, was taken over")
    lock = held[store.uri] = StoreLock(store, owner, heartbeat_s)
    return lock


def read_owner(store: RunStore) -> Owner | None:
    """Who has, or had, a folder; None if nobody ever had.   Raises: LockError if the file is damaged; StoreError."""
    content = store.read(LOCK_NAME)
    if content is None:
        return None
    if owner := parse(content.decode(errors="replace")):
        return owner
    raise LockError(f"{store.shown}/{LOCK_NAME} is damaged: if no run writes to the folder, delete that file.")


def is_running(store: RunStore, owner: Owner) -> bool:
    """As mixmae.lock.is_running."""
    return is_moving(owner, lambda: store.read(LOCK_NAME), HEARTBEAT_S, WATCH_S)
