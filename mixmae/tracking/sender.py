"""Sends the journal of a run to MLflow, in a thread of the driver.

MLflow may be away at any time, or its sqlite file locked: the thread tries again until it answers, and nobody else
waits for it. All points arrive once and in order: MLflow drops a point that it has with the same time and value, so a
batch that was sent but not noted as sent is sent again without harm; a run that was made, but whose answer was lost, is
found again by its key. What MLflow answers that it does not take, such as a name that it does not allow, is set aside
in a file, counted and named, and what comes after it goes on.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixmae.machine import settle_environment
from mixmae.tracking.journal import (
    JOURNAL,
    REFUSED,
    SENT,
    Entry,
    Journal,
    Reader,
    Sent,
    backlog,
    now_ms,
    read_sent,
    refused,
    to_line,
    unsent,
)
from mixmae.tracking.runs import create_run, drop_twins, log_file
from mixmae.tracking.store import RunRef, StoreAway, TrackingError, connect, explain, is_gone, is_refusal, link_in_note
from mixmae.writing import writing

START_S, START_SQLITE_S = 10.0, 60.0
"""How long the start of a run waits for MLflow; the first use of a sqlite file alone takes seconds."""
CLOSE_S, MAX_CLOSE_S = 10.0, 60.0
"""How long the end of a run waits: without progress, and at most."""
POLL_S = 1.0
"""Between looks at the journal."""
MAX_PAUSE_S = 20.0
"""Between tries while MLflow is away."""
MAX_POINTS = 500
"""Of a batch; MLflow takes 1000."""
FILE_TRIES = 3
"""After so many failures a picture or a file that MLflow does not take, though it answers, is left out."""


def start_sending(
    folder: Path,
    uri: str,
    spec: Mapping[str, Any],
    *,
    continues: bool,
    known: RunRef | None = None,
    limit: Callable[[], float] = lambda: math.inf,
) -> Sender:
    """Begin or continue the journal of a run, and its thread. Nothing is asked of MLflow here: see Sender.opened.

    Args:
        spec: of a new run, what create_run takes beside uri, key and start_time.
        continues: whether the run has trained before.
        known: its MLflow run, where that is older than the journal.
        limit: as Sender has it.
    """
    sent = read_sent(folder)
    if not continues or not (folder / JOURNAL).exists():
        first = to_line({"time": now_ms(), "run": spec, "key": uuid.uuid4().hex})
        with writing(folder / JOURNAL) as partial:
            partial.write_bytes(first)
        sent = Sent(uri=known.uri, run=known, offset=len(first)) if known and continues else Sent(uri=uri)
    if sent.uri != uri:  # to another store all of it goes, to a run of its own
        sent = Sent(uri=uri)
    if sent.offset == 0:
        (folder / REFUSED).unlink(missing_ok=True)
    sent.write(folder)
    if continues:
        Journal(folder).add(status="RUNNING")
    return Sender(folder, limit)


def send_rest(folders: Iterable[Path], uri: str | None = None) -> str | None:
    """Send what MLflow does not have yet of runs that nobody trains now; waits as Sender.close does.

    Args: uri: of the store, for runs that were never in one; None: where they were tried.
    Returns: a line about what is still left, or None.
    """
    for folder in folders:
        if not unsent(folder):
            continue
        sent = read_sent(folder)
        if uri is not None and sent.run is None:
            Sent(uri=uri).write(folder)
        elif not sent.uri:
            return f"{folder / SENT} is missing or damaged: give --mlflow-uri, and all of the run is sent there."
        if left := Sender(folder).close():
            return left
    return None


def end_later(
    folder: Path,
    ref: RunRef | None,
    *,
    status: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    step: int = 0,
) -> None:
    """Put the end of a run whose process is gone in its journal: send_rest sends it.   Args: ref: the run, if known."""
    if ref is not None and not (folder / JOURNAL).exists():  # a run that is older than journals
        Sent(uri=ref.uri, run=ref).write(folder)
    journal = Journal(folder)
    if metrics:
        journal.add_points(metrics, step)
    journal.add(status=status, tags=dict(tags or {}))


class Sender:
    """The thread. What it has to tell, a line when MLflow goes away and one when it is back, it prints."""

    def __init__(self, folder: Path, limit: Callable[[], float] = lambda: math.inf) -> None:
        """
        Args:
            folder: of the run; its journal has been begun.
            limit: up to which byte of the journal may be sent now: a run that is copied to a store, and continued from
                there, must not have sent points that its copy does not have.
        """
        self._folder, self._limit = folder, limit
        self._sent = read_sent(folder)
        self._reader = Reader(folder, limit)
        self._queue: deque[tuple[Entry, int]] = deque()
        self._kept: dict[Path, str] = {}
        self._is_checked = False  # whether the store has said that it has the run
        self._is_told = False  # whether the user knows that something was refused
        self.trouble: TrackingError | None = None
        """Why the last try failed, until one succeeds."""
        self._failures = 0
        self._progress_at = time.monotonic()
        self._tried, self._closing, self._stopped = threading.Event(), threading.Event(), threading.Event()
        settle_environment()
        import mlflow  # noqa: F401  # this takes seconds: not of those that `opened` waits

        self._thread = threading.Thread(target=self._work, name="MLflow", daemon=True)
        self._thread.start()

    @property
    def ref(self) -> RunRef | None:
        """The run in MLflow, once it is there."""
        return self._sent.run

    def opened(self) -> RunRef | None:
        """Wait, for seconds, until MLflow has answered.

        Returns: the run; None if MLflow is away: a new run is made once it answers.
        Raises: TrackingError if MLflow has never had the run and answers otherwise than it should.
        """
        self._tried.wait(START_SQLITE_S if self._sent.uri.startswith("sqlite:") else START_S)
        trouble = self.trouble
        if self.ref is None and trouble is not None and not isinstance(trouble, StoreAway):
            self._stopped.set()
            raise trouble
        if trouble is not None or not self._tried.is_set():
            self._failures = 2  # this is the note
            _say(
                f"note: {trouble or f'MLflow at {self._sent.uri} does not answer.'}\n      Training goes on: what is "
                f"logged waits in {self._folder / JOURNAL}"
            )
        return self.ref

    def keep(self, path: Path, title: str) -> None:
        """Have a picture that is drawn anew now and then among the run's artifacts, when MLflow has time for it."""
        self._kept[path] = title

    def close(self) -> str | None:
        """Send what is left, but wait no longer than CLOSE_S without progress.

        Returns: None if all is sent, else a line on what is left.
        """
        start = time.monotonic()
        self._closing.set()
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)
            now = time.monotonic()
            if now > start + MAX_CLOSE_S or now > max(start, self._progress_at) + CLOSE_S:
                break
        self._stopped.set()
        if self._is_told:
            count = len(refused(self._folder))
            _say(f"note: MLflow has refused {count} entries of this run: see {self._folder / REFUSED}")
        if not unsent(self._folder):
            return None
        return (
            f"MLflow at {self._sent.uri} lacks {backlog(self._folder)} points and the end of the run: {JOURNAL} keeps "
            f"them, and the same command sends them once it answers.{f' ({self.trouble})' if self.trouble else ''}"
        )

    def leave(self) -> None:
        """Send nothing more: the journal is somebody else's."""
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.is_set():
            is_last = self._closing.is_set()  # asked first: what is written until `close` has to be read after it
            try:
                is_more = self._send()
            except Exception as error:
                self._fail(error)
                continue
            if self._failures > 1:
                _say(f"note: MLflow at {self._sent.uri} answers again")
            self._failures, self.trouble = 0, None
            self._tried.set()
            if is_more:
                self._progress_at = time.monotonic()
            elif is_last:
                return
            else:
                self._closing.wait(POLL_S)

    def _fail(self, error: Exception) -> None:
        """Note that a try has failed, and wait for the next one."""
        self.trouble = error if isinstance(error, TrackingError) else explain(self._sent.uri, error)
        self._failures += 1
        self._is_checked = False
        if self._failures == 2 and not self._closing.is_set():  # of a single failure nobody has to know
            what = "is away" if isinstance(self.trouble, StoreAway) else "cannot be used"
            _say(f"note: MLflow {what}, training goes on without it: {self.trouble}")
        self._tried.set()
        self._closing.wait(min(MAX_PAUSE_S, 2.0 ** min(self._failures, 10) / 2))
        if self._closing.is_set():
            self._stopped.wait(0.5)

    def _send(self) -> bool:
        """Send the next entries.   Returns: False if there were none."""
        if self._sent.run is not None and not self._is_checked:
            self._check_run(self._sent.run)
        if not self._queue:
            read = self._reader.read(max_entries=MAX_POINTS)
            self._queue.extend(item for item in read if item[1] > self._sent.offset)
            if not self._queue:
                return bool(read) or self._send_kept()
        entry, end = self._queue[0]
        if self._sent.run is None:
            self._create(entry, end)
        elif "metrics" in entry:
            self._send_points(self._sent.run)
        else:
            try:
                self._send_other(self._sent.run, entry)
            except Exception as error:
                if not is_refusal(error):
                    raise
                connect(self._sent.run.uri).get_run(self._sent.run.run_id)  # raises if it was not MLflow that answered
                self._set_aside([{**entry, "reason": _first_line(error)}])
            self._done(1)
        return True

    def _check_run(self, run: RunRef) -> None:
        """If the store has answered that it no longer has the run, all of the journal goes to a new one."""
        try:
            stage = connect(run.uri).get_run(run.run_id).info.lifecycle_stage
        except Exception as error:
            if not is_gone(error):
                raise
            stage = "deleted"
        self._is_checked = True
        if stage == "deleted":
            _say(f"note: the run {run.run_id} is no longer in {run.uri}; its curves go to a new one")
            self._sent = Sent(uri=self._sent.uri)
            self._reader, self._queue = Reader(self._folder, self._limit), deque()
            (self._folder / REFUSED).unlink(missing_ok=True)

    def _create(self, entry: Entry, end: int) -> None:
        if "run" not in entry:
            raise TrackingError(f"{self._folder / JOURNAL} does not begin with the run: it cannot be sent.")
        ref = create_run(uri=self._sent.uri, key=entry["key"], start_time=entry["time"], **entry["run"])
        self._sent = Sent(uri=self._sent.uri, run=ref, offset=self._sent.offset)
        self._is_checked = True
        self._done(1)

    def _send_points(self, run: RunRef) -> None:
        """All entries of points at the head of the queue, in batches that are not too large."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        num_entries = 0
        for entry, _ in self._queue:
            values = entry.get("metrics", {})
            found = [Metric(name, value, entry["time"], entry["step"]) for name, value in values.items()]
            if not found or (batch and len(batch) + len(found) > MAX_POINTS):
                break
            batch += found
            num_entries += 1
        client = connect(run.uri)
        try:
            client.log_batch(run.run_id, metrics=batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._send_one_by_one(client, run, num_entries)
        self._done(num_entries)

    def _send_one_by_one(self, client: Any, run: RunRef, num_entries: int) -> None:
        """The points of a batch that was refused, to find those for which it was."""
        from mlflow.entities import Metric

        found: list[Entry] = []
        for entry, _ in list(self._queue)[:num_entries]:
            for name, value in entry["metrics"].items():
                try:
                    client.log_batch(run.run_id, metrics=[Metric(name, value, entry["time"], entry["step"])])
                except Exception as error:
                    if not is_refusal(error):
                        raise
                    found.append({**entry, "metrics": {name: value}, "reason": _first_line(error)})
        client.get_run(run.run_id)  # raises if what answered was not MLflow
        self._set_aside(found)

    def _set_aside(self, entries: list[Entry]) -> None:
        """Keep what MLflow does not take, and say so once."""
        if not entries:
            return
        with contextlib.suppress(OSError), (self._folder / REFUSED).open("ab") as file:
            file.writelines(map(to_line, entries))
        if not self._is_told:
            self._is_told = True
            first = entries[0]
            what = next(iter(first.get("metrics", ())), "") or first.get("image") or first.get("file") or "an entry"
            _say(f"note: MLflow does not take {what} ({first['reason']}): it is kept in {self._folder / REFUSED}")

    def _send_other(self, run: RunRef, entry: Entry) -> None:
        client = connect(run.uri)
        if "status" in entry:
            for key, value in entry.get("tags", {}).items():
                client.set_tag(run.run_id, key, value)
            if entry["status"] == "RUNNING":
                client.update_run(run.run_id, status="RUNNING")
            else:
                client.set_terminated(run.run_id, status=entry["status"], end_time=entry["time"])
                first = Reader(self._folder).read(max_entries=1)[0][0]
                if "key" in first:
                    drop_twins(run, first["key"])
        elif "image" in entry or "file" in entry:
            try:
                self._send_file(run, entry)
            except Exception as error:
                client.get_run(run.run_id)  # raises if MLflow is away
                if "locked" in str(error) or (self._failures < FILE_TRIES and not is_refusal(error)):
                    raise
                self._set_aside([{**entry, "reason": _first_line(error)}])

    def _send_file(self, run: RunRef, entry: Entry) -> None:
        path = self._folder / (entry.get("image") or entry["file"])
        if not path.exists():
            return self._set_aside([{**entry, "reason": f"{path} is gone"}])
        if "file" in entry:
            log_file(run, path, title=entry.get("title"))
            return
        client, key, step = connect(run.uri), entry["key"], entry["step"]
        sent = re.compile(rf"images/{re.escape(key)}[+%]step[+%]{step}[+%]")
        with Image.open(path) as image:
            image.load()
        if not any(sent.match(artifact.path) for artifact in client.list_artifacts(run.run_id, "images")):
            client.log_image(run.run_id, image, key=key, step=step, timestamp=entry["time"])
        # MLflow's own card for a series opens on a list of parameters: the newest image is also a file with a link.
        client.log_image(run.run_id, image, artifact_file=f"{key}.png")
        link_in_note(run, f"{key}.png", f"newest {key}")

    def _send_kept(self) -> bool:
        if self._sent.run is None or not self._kept:
            return False
        path, title = self._kept.popitem()
        log_file(self._sent.run, path, title=title)
        return True

    def _done(self, num_entries: int) -> None:
        """Note that entries at the head of the queue are sent."""
        for _ in range(num_entries):
            _, end = self._queue.popleft()
        self._sent = Sent(uri=self._sent.uri, run=self._sent.run, offset=end)
        if self._stopped.is_set():  # closed while MLflow took its time: another sender may be further
            return
        with contextlib.suppress(OSError):  # a full disk: this process knows, and another one may send it again
            self._sent.write(self._folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(line, flush=True)
