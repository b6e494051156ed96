"""The lock on a folder, such as a run's: one process at a time writes there, and everybody can read whose it is.

run.lock is one JSON object: who holds it, since when, a heartbeat, and a generation that grows with each taking. At the
end it stays there, marked as released, so that no generation comes twice.

Why two runs cannot both hold it, on a local disk and on NFS: to take generation g + 1, a process makes the file
run.lock.<g + 1> exclusively (O_EXCL; flock is not reliable everywhere), looks whether generation g is still the last
one, renames its file to run.lock, and reads back whether it is there. A heartbeat is written into the holder's own open
file, in place and of the same length: a holder that was taken for dead and wakes up writes into a file without a name.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

LOCK_FILE = "run.lock"
HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
WATCH_S = 30.0
"""A heartbeat on another machine that stands still for as long is a dead run's. It is watched, not compared with this
machine's clock."""
CLAIM_S = 5.0
"""A claim becomes the lock, or goes, in moments; if it does neither for as long, its maker is taken for the owner."""
NEVER = "-" * len("2026-01-01T00:00:00.000Z")
"""A time that has not come, as long as one that has."""

ENDED = -1.0
"""In the place of a start time: the process is over, and only nobody has asked yet how it ended."""


class LockError(ValueError):
    """The folder is another run's; the message says whose, and what to do."""


class InUse(LockError):
    """Somebody else has the folder, and lives."""


class LockPlace(Protocol):
    """A store that a run's folder is in (mixmae.training.run_store); a run works in a folder of its machine then."""

    @property
    def uri(self) -> str: ...
    @property
    def shown(self) -> str: ...
    def read(self, name: str) -> bytes | None: ...


class Hold(NamedTuple):
    """What a process on any node needs to ask whether its run still has the folder: holds(*hold)."""

    folder: Path
    generation: int
    store: LockPlace | None = None


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The content of run.lock."""

    host: str
    pid: int
    started_ticks: float
    """When the process was started, on a clock that nobody sets: a pid alone may be another process's by now."""
    pid_space: str
    """In which pids are counted: those of two containers on one machine differ."""
    user: str
    job: str | None
    """Id of the Ray job, if it is one."""
    command: str
    started: str
    heartbeat: str
    released: str
    """When it was given back, or NEVER."""
    generation: int
    token: str
    """Random."""

    @property
    def is_released(self) -> bool:
        """Whether it was given back."""
        return self.released != NEVER

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if the process lives."""
        return (self.host, self.pid_space) == (socket.gethostname(), _pid_space())

    @property
    def is_alive(self) -> bool:
        """Whether the process lives, if it is one of this machine's."""
        ticks = _started_ticks(self.pid)
        return _is_hidden(self.pid) if ticks is None else ticks == self.started_ticks

    @property
    def age_s(self) -> float:
        """Seconds since the last heartbeat, as far as the clocks of both machines agree."""
        return time.time() - datetime.fromisoformat(self.heartbeat).timestamp()

    @property
    def name(self) -> str:
        """Who it is, in words."""
        job = f", Ray job {self.job}" if self.job else ""
        return f"{self.user} on {self.host} (process {self.pid}{job})"


class Lock:
    """A lock that this process holds, until `release`; a thread of its own keeps the heartbeat."""

    def __init__(self, folder: Path, owner: Owner, file: int, heartbeat_s: float) -> None:
        """file: descriptor of run.lock, which this closes."""
        self.hold = Hold(folder, owner.generation)
        self._owner, self._file, self._heartbeat_s = owner, file, heartbeat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def is_ours(self) -> bool:
        """Whether this process still holds the folder.   Raises: OSError if the folder cannot be read."""
        now = read_owner(self.hold.folder)
        return now is not None and now.token == self._owner.token and not now.is_released

    def release(self) -> None:
        """Give the folder back; nothing if that was done, or if another run has taken it."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            _write(self._file, replace(self._owner, heartbeat=now(), released=now()))
        with contextlib.suppress(OSError):  # NFS reports a write that failed here
            os.close(self._file)
        held.pop(self.hold.folder, None)

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):  # the storage may be back at the next one
                _write(self._file, replace(self._owner, heartbeat=now()))


class HeldLock(Protocol):
    """A lock of this process, on a folder or in a store."""

    def is_ours(self) -> bool: ...
    def release(self) -> None: ...


held: dict[Path | str, HeldLock] = {}
"""The locks of this process, by the folder, or the URI of the store."""


def take(
    folder: Path,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    watch_s: float = WATCH_S,
    say: Callable[[str], None] = print,
) -> Lock:
    """Take the lock of a run's folder, which is made if it is missing; a process that has it gets it once more.

    A dead owner's is taken over: at once if it was a process of this machine, else after its heartbeat stood still
    for `watch_s` seconds.

    Args: say: gets a line before such a wait, and after a lock was taken over.
    Raises: LockError if another run has it; ValueError if the folder cannot be written.
    """
    folder = folder.resolve()
    known = held.get(folder)
    if isinstance(known, Lock) and known.is_ours():
        return known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock, patient_until = None, time.monotonic() + CLAIM_S
        while lock is None:
            before = read_owner(folder)
            if before is not None:
                refuse_living(before, str(folder), partial(_bytes, folder / LOCK_FILE), watch_s, say)
            try:
                lock = _claim(folder, before, heartbeat_s, watch_s, say)
            except InUse:  # by who claims it, and may lose to a third one: who has it in the end is to be named
                if time.monotonic() > patient_until:
                    raise
    except OSError as error:
        raise ValueError(
            f"The output folder {folder} cannot be written ({error.strerror}): choose another --output."
        ) from error
    if before is not None and not before.is_released:
        say(f"note: the lock of {before.name}, which is gone, was taken over")
    held[folder] = lock
    return lock


@contextlib.contextmanager
def in_turn(folder: Path, what: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a folder while the context is open; who comes while another process has it waits for it.

    Args: what: the other one makes, for the line that is said then.
    Raises: as take, but not InUse.
    """
    lock, is_told = None, False
    while lock is None:
        try:
            lock = take(folder, say=say)
        except InUse:
            owner = read_owner(folder)
            if not is_told and owner is not None:
                is_told = True
                say(f"note: {owner.name} is making {what}: waiting until it is done")
            time.sleep(1.0)
    try:
        yield
    finally:
        lock.release()


def release_all() -> None:
    """Give back all locks of this process."""
    for lock in list(held.values()):
        lock.release()


def holds(folder: Path, generation: int, store: LockPlace | None = None) -> bool:
    """Whether the run that took this generation of a folder's lock still has it; any process on any node may ask.

    Args:   store: that the folder is copied to: then the lock is there.
    Raises: OSError if the folder cannot be read, which says nothing about the lock.
    """
    if store is None:
        owner = read_owner(folder)
    elif store.uri in held:  # it asks the store itself, with each heartbeat
        return held[store.uri].is_ours()
    else:
        content = store.read(LOCK_FILE)
        owner = None if content is None else parse(content.decode(errors="replace"))
    return owner is not None and owner.generation == generation and not owner.is_released


def taken_over(folder: Path, generation: int, store: LockPlace | None = None) -> LockError:
    """What a run has to say that no longer holds its folder.   Args: as holds."""
    owner, shown = None, str(folder) if store is None else store.shown
    with contextlib.suppress(OSError, LockError):
        if store is None:
            owner = read_owner(folder)
        elif content := store.read(LOCK_FILE):
            owner = parse(content.decode(errors="replace"))
    by = f"by {owner.name}" if owner and owner.generation != generation else "by another run"
    return LockError(
        f"{shown} was taken over {by}, which saw no sign of life of this run: this one has ended and leaves the "
        f"folder alone. `python pipelines/status.py {shown}` tells how the other one is."
    )


def is_running(folder: Path, owner: Owner) -> bool:
    """Whether the run of a folder's owner goes on; one elsewhere whose heartbeat is old is watched for two more."""
    return is_moving(owner, partial(_bytes, folder / LOCK_FILE), HEARTBEAT_S, WATCH_S)


def is_moving(owner: Owner, read: Callable[[], bytes | None], heartbeat_s: float, watch_s: float) -> bool:
    """As is_running, of any lock.   Args: read: its content, now."""
    if owner.is_released or owner.is_here:
        return not owner.is_released and owner.is_alive
    return abs(owner.age_s) < watch_s or _changes(read, 2.2 * heartbeat_s)


def read_owner(folder: Path) -> Owner | None:
    """Who has, or had, a folder; None if nobody ever had.

    Raises: LockError if the file is damaged; OSError if it cannot be read.
    """
    file = folder / LOCK_FILE
    for _ in range(5):
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        if owner := parse(text):
            return owner
        time.sleep(0.1)
    raise LockError(f"{file} is damaged: if no run writes to the folder, remove that file.")


def _claim(
    folder: Path, before: Owner | None, heartbeat_s: float, watch_s: float, say: Callable[[str], None]
) -> Lock | None:
    """Try to become the next owner after `before`.

    Returns: None if somebody else was faster, and one has to look again.   Raises: InUse while another one claims it.
    """
    owner = this_process(generation=before.generation + 1 if before else 1)
    claim = folder / f"{LOCK_FILE}.{owner.generation}"
    try:
        file = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    except FileExistsError:  # another run is between its claim and the lock, or died there
        time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            other = parse(claim.read_text(encoding="utf-8"))
            refuse_living(other, str(folder), partial(_bytes, claim), watch_s, say)
            claim.unlink()
        return None
    is_taken = False
    try:
        _write(file, owner)
        now = read_owner(folder)
        if (now and now.token) == (before and before.token):
            with contextlib.suppress(FileNotFoundError):  # who took us for dead may have renamed it
                claim.replace(folder / LOCK_FILE)
            now = read_owner(folder)
        # Also if it was another one that renamed our claim, because its own had been removed as a dead one's.
        is_taken = now is not None and now.token == owner.token
    finally:
        if not is_taken:
            os.close(file)
            if _read(claim) == owner:
                claim.unlink(missing_ok=True)
    return Lock(folder, owner, file, heartbeat_s) if is_taken else None


def refuse_living(
    owner: Owner | None, shown: str, read: Callable[[], bytes | None], watch_s: float, say: Callable[[str], None]
) -> None:
    """Return if an owner has released the lock, or is dead, which may have to be watched.

    Args:   owner: None if what it wrote is not whole.  shown: the folder.  read: the content of the lock, now.
    Raises: InUse if it lives.
    """
    if owner is not None and (owner.is_released or (owner.is_here and not owner.is_alive)):
        return
    seen_s = owner.age_s if owner else 0.0
    if owner is None or not owner.is_here:
        if owner is not None:
            say(f"note: {shown} belongs to {owner.name}: watching for up to {watch_s:.0f} s whether that still runs")
        if not _changes(read, watch_s):
            return
        content = read()
        owner, seen_s = None if content is None else parse(content.decode(errors="replace")), 0.0
        if owner is None or owner.is_released:
            return  # it is looked at again
    kill = f"kill -INT {owner.pid}" if owner.is_here else f"ssh {owner.host} kill -INT {owner.pid}"
    stop = f"ray job stop {owner.job}" if owner.job else kill
    since = datetime.fromisoformat(owner.started).astimezone().strftime("%d %B %H:%M:%S")
    raise InUse(
        f"{shown} is in use by {owner.name} since {since}, heartbeat {seen_s:.0f} s ago: choose another --output, or "
        f"stop that run first ({stop})."
    )


def _changes(read: Callable[[], bytes | None], watch_s: float) -> bool:
    """Whether the content of a lock changes within some seconds."""
    before, deadline = read(), time.monotonic() + watch_s
    while time.monotonic() < deadline:
        if read() != before:
            return True
        time.sleep(min(0.5, watch_s / 10))
    return False


def this_process(generation: int) -> Owner:
    """This process as the owner of a lock from now on."""
    ticks = _started_ticks(os.getpid())
    assert ticks is not None
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody has set one: see mixmae.machine.settle_environment
        user = "?"
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata", {}).get("job_submission_id")
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started_ticks=ticks,
        pid_space=_pid_space(),
        user=user,
        job=job,
        command=shlex.join(sys.argv)[:500],
        started=now(),
        heartbeat=now(),
        released=NEVER,
        generation=generation,
        token=secrets.token_hex(8),
    )


def _started_ticks(pid: int) -> float | None:
    """When a process was started, in a unit of its own; ENDED for a zombie, None if it cannot be seen."""
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None
        return ENDED if state in "ZX" else float(rest[18])
    import psutil

    try:
        process = psutil.Process(pid)
        return ENDED if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, of another user, that this one may not look at (/proc with hidepid)."""
    try:
        os.kill(pid, 0)  # the signal 0 does nothing
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _pid_space() -> str:
    """Name of what pids are unique in: this boot of the machine, and on Linux the container's namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def now() -> str:
    """The time, as a lock has it: of the clock that its age is reckoned by."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dump(owner: Owner) -> bytes:
    """What a lock file holds. That of a process always has one length."""
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def _write(file: int, owner: Owner) -> None:
    """Write an owner in place: who reads meanwhile gets whole JSON."""
    os.pwrite(file, dump(owner), 0)
    os.fsync(file)


def _read(file: Path) -> Owner | None:
    content = _bytes(file)
    return None if content is None else parse(content.decode(errors="replace"))


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def parse(text: str) -> Owner | None:
    """The owner in a lock file; None if it is not whole."""
    try:
        content = json.loads(text)
        return Owner(**{item.name: content[item.name] for item in fields(Owner)})
    except (ValueError, KeyError, TypeError):
        return None
