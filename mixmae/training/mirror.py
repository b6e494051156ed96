"""Copies a run's files from its staging folder to its store, in a thread: training never waits for the store."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from mixmae.training.budget import STORE_PATIENCE_S
from mixmae.training.checkpoint_files import checkpoints_of
from mixmae.training.run_store import JOURNAL, STATE_FILE, RunStore, links_of, merged, part_of
from mixmae.writing import writing

PUSH_S = 15.0
"""Between two copies of small files. A new checkpoint does not wait for it."""
HASTE_S = 30.0
"""How long an end waits that came too early."""
_LOOK_S = 1.0
LONGEST_PAUSE_S = 60.0


class Mirror:
    """Copies what changes of one part, and waits for a store that is away.

    A checkpoint comes after the journal, so that all that was logged before it is there. Of several that were written
    while the store was away, the newest is copied. Leaving the context without an exception waits until all is there.

    Args:
        part: "worker": with the journal, checkpoints and best weights; "driver": with the journal while `owns_journal`.
        keep: newest checkpoints that stay in the store; None: all.
        may_write: asked before each copy: False where the run has lost its folder to another one.
        say: gets one line when the store goes away, and one when it is back.
        patience_s: how long the end waits for a store that is away.
    """

    def __init__(
        self,
        store: RunStore,
        part: Literal["driver", "worker"],
        *,
        keep: int | None = None,
        may_write: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = print,
        patience_s: float = STORE_PATIENCE_S,
    ) -> None:
        self.store, self.patience_s = store, patience_s
        self.owns_journal = True
        self.uploaded: set[str] = set()
        """Names of checkpoints that the store has."""
        self.journal_bytes = math.inf
        """Of the journal, how much the store has, once that is known."""
        self._part, self._keep, self._may_write, self._say = part, keep, may_write, say
        self._pushed: dict[str, tuple[int, int]] = {}
        self._best = b""
        self._failures, self._away_since = 0, 0.0
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mirror of {part}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
            else:  # who waits for what was raised does not wait for the store
                self.patience_s = min(self.patience_s, HASTE_S)
                with contextlib.suppress(OSError):
                    self.finish()
        finally:
            self._stopped.set()

    def finish(self) -> None:
        """Copy all that is left.   Raises: StoreError when the patience is spent."""
        self._patiently(self.push)

    def take_journal(self) -> None:
        """Be the one that writes the journal, with all that another process has written.   Raises: as finish."""
        self._patiently(self.store.bring_journal)
        self.owns_journal = True

    def bring_results(self) -> None:
        """See RunStore.bring_results.   Raises: as finish."""
        self._patiently(self.store.bring_results)

    def start_journal(self) -> None:
        """Have in the store the journal that is here, and nothing else.   Raises: StoreError."""
        content = (self.store.local / JOURNAL).read_bytes()
        self.store.write(JOURNAL, content)
        self.journal_bytes = len(content)

    def _patiently(self, action: Callable[[], None]) -> None:
        while not self._stopped.is_set():
            try:
                return action()
            except OSError as error:
                self._fail(error)
                if time.monotonic() - self._away_since > self.patience_s:
                    raise
                self._stopped.wait(self._pause_s)

    def push(self) -> None:
        """Copy what has changed, once.   Raises: StoreError."""
        with self._turn:
            if not (self._may_write() and self.store.has(self._part)):
                self._stopped.set()  # the driver ends the run
                return
            newest = next(iter(checkpoints_of(self.store.local)), None) if self._part == "worker" else None
            if self.owns_journal:
                self._push_journal()
            else:
                self._follow_journal()
            self._push_files()
            if self._part == "worker":
                self._push_best()
            if newest is not None and newest.name not in self.uploaded:
                self._push_checkpoint(newest)
        if self._failures > 1 and self.owns_journal:
            self._say(f"{self.store.shown} answers again")
        self._failures = 0

    @property
    def _pause_s(self) -> float:
        return min(LONGEST_PAUSE_S, 2.0 ** min(self._failures, 10) / 2)

    def _work(self) -> None:
        pushed = 0.0
        while not self._stopped.wait(self._pause_s if self._failures else _LOOK_S):
            is_new = self._part == "worker" and any(
                path.name not in self.uploaded for path in checkpoints_of(self.store.local)[:1]
            )
            if not is_new and time.monotonic() < pushed + PUSH_S:
                continue
            try:
                self.push()
                pushed = time.monotonic()
            except Exception as error:  # the next try comes
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            self._away_since = time.monotonic()
        self._failures += 1
        if self._failures == 2 and self.owns_journal:  # else rank 0 tells
            self._say(
                f"{error} Training goes on; what is to be copied to {self.store.shown} waits in {self.store.local}"
            )

    def _push_journal(self) -> None:
        """Copy whole lines; what another process has added there is kept, and comes here."""
        file = self.store.local / JOURNAL
        ours = file.read_bytes() if file.exists() else b""
        if not ours:
            return
        there = self.store.size(JOURNAL)
        if there != self.journal_bytes:
            both = merged(self.store.read(JOURNAL) or b"", ours)
            if not both.startswith(ours):
                with writing(file) as partial:
                    partial.write_bytes(both)
            ours = both
        ours = ours[: ours.rfind(b"\n") + 1]
        if len(ours) != there:
            self.store.write(JOURNAL, ours)
        self.journal_bytes = len(ours)

    def _follow_journal(self) -> None:
        """Note how much of the journal the store has, and bring it if rank 0 is on another node."""
        self.journal_bytes = self.store.size(JOURNAL)
        file = self.store.local / JOURNAL
        if self.journal_bytes > (file.stat().st_size if file.exists() else 0):
            self.store.bring_journal()

    def _push_files(self) -> None:
        for path in self.store.local.rglob("*"):
            name = path.relative_to(self.store.local).as_posix()
            if part_of(name) != self._part or name.split("/")[0] in ("checkpoints", "best") or not path.is_file():
                continue
            if "/checkpoints/" in name or "/best/" in name:  # of what was put aside: moved in the store
                continue
            with contextlib.suppress(FileNotFoundError):  # it was replaced or deleted just now
                stat = path.stat()
                stamp = (stat.st_mtime_ns, stat.st_size)
                if self._pushed.get(name) != stamp:
                    self.store.put(path, name)
                    self._pushed[name] = stamp

    def _push_best(self) -> None:
        best = self.store.local / "best"
        with contextlib.suppress(FileNotFoundError):
            state = (best / STATE_FILE).read_bytes()
            if state in (self._best, self.store.read(f"best/{STATE_FILE}")):
                self._best = state
                return
            links = self._links(best)
            if (links / STATE_FILE).read_bytes() == state:  # else it was replaced meanwhile: next time
                self.store.put_folder(links, "best")
                self._best = state

    def _push_checkpoint(self, newest: Path) -> None:
        name = f"checkpoints/{newest.name}"
        with contextlib.suppress(FileNotFoundError):
            if self.store.read(f"{name}/{STATE_FILE}") != (newest / STATE_FILE).read_bytes():
                self.store.put_folder(self._links(newest), name)
            self.uploaded.add(newest.name)
            if self._keep:
                self.store.remove_older(self._keep)

    def _links(self, folder: Path) -> Path:
        top = self.store.local / ".uploading"
        shutil.rmtree(top, ignore_errors=True)
        return links_of(folder, top / folder.name)
