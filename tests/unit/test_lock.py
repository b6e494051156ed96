"""The lock of a run's folder, with real processes: a living owner, a killed one, a stopped one, many at one moment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixmae import lock as locking
from mixmae.lock import LOCK_FILE, LockError, holds, read_owner, release_all, take
from pipelines.command import command
from pipelines.run import RunFolder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(60)

HOLDER = """
import sys
from pathlib import Path
from mixmae.lock import LockError, holds, take
folder = Path(sys.argv[1])
try:
    lock = take(folder, heartbeat_s=0.05, watch_s=float(sys.argv[2]), say=lambda line: print(line, flush=True))
except LockError as error:
    sys.exit(f"refused: {error}")
print("taken", lock.hold.generation, flush=True)
for line in sys.stdin:
    print(lock.is_ours(), holds(*lock.hold), flush=True)
lock.release()
"""
"""Takes the lock and answers a line with whether it still has it; gives it back when its stdin is closed."""


class Holder:
    def __init__(self, folder: Path, *, watch_s: float = 1.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), str(watch_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def line(self) -> str:
        """The next line of what it prints; empty at its end."""
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> str:
        """Close its stdin and wait; returns what it said on stderr."""
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def holder() -> Iterator[type[Holder]]:
    """Makes holders, and ends them after the test."""
    made = []

    def make(folder: Path, **options: float) -> Holder:
        made.append(Holder(folder, **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGCONT)
        one.process.kill()
        one.process.communicate()


def edit(folder: Path, **changes: object) -> None:
    """Write the lock as another machine's process would: in place, so that the holder's heartbeats do not end it."""
    file = folder / LOCK_FILE
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content, indent=1) + "\n")


@pytest.fixture(autouse=True)
def give_back() -> Iterator[None]:
    yield
    release_all()


def test_a_living_owner_is_named_and_left_alone(tmp_path, holder):
    owner = holder(tmp_path)
    assert owner.line() == "taken 1"
    with pytest.raises(LockError) as refused:
        take(tmp_path)
    pid = owner.process.pid
    assert re.fullmatch(
        rf"{tmp_path} is in use by \S+ on \S+ \(process {pid}\) since \d\d \w+ [\d:]{{8}}, heartbeat \d s ago: choose "
        rf"another --output, or stop that run first \(kill -INT {pid}\)\.",
        str(refused.value),
    )
    assert owner.ask() == "True True"
    content = json.loads((tmp_path / LOCK_FILE).read_text())
    assert content["pid"] == pid
    assert content["generation"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]
    owner.end()
    assert read_owner(tmp_path).is_released
    assert take(tmp_path, say=pytest.fail).hold.generation == 2


def test_the_heartbeat_moves_and_any_process_can_check(tmp_path):
    lock = take(tmp_path, heartbeat_s=0.05)
    before = read_owner(tmp_path).heartbeat
    deadline = time.monotonic() + 20
    while read_owner(tmp_path).heartbeat == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert take(tmp_path) is lock, "a process is not its own rival"
    assert lock.is_ours()
    assert holds(tmp_path, 1)
    assert not holds(tmp_path, 2)
    lock.release()
    lock.release()
    assert not lock.is_ours()
    assert not holds(tmp_path, 1)
    assert not holds(tmp_path / "nowhere", 1)


def test_a_killed_owner_is_succeeded_at_once(tmp_path, holder):
    owner = holder(tmp_path)
    assert owner.line() == "taken 1"
    owner.process.send_signal(signal.SIGKILL)  # it stays a zombie: nobody has waited for it
    while Path(f"/proc/{owner.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    said: list[str] = []
    assert take(tmp_path, watch_s=50, say=said.append).hold.generation == 2
    assert re.fullmatch(r"note: the lock of .* which is gone, was taken over", "".join(said))


def test_a_pid_that_is_another_process_by_now_is_not_the_owner(tmp_path):
    take(tmp_path).release()
    edit(tmp_path, pid=os.getpid(), started_ticks=1.0, released=read_owner(tmp_path).heartbeat)
    edit(tmp_path, released="-" * 24)
    assert not read_owner(tmp_path).is_released
    assert take(tmp_path, watch_s=50).hold.generation == 2


def test_a_process_of_another_user_that_proc_hides_is_alive(tmp_path, monkeypatch):
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    take(tmp_path).release()
    edit(tmp_path, pid=2**22 + 1, released="-" * 24)  # above the largest pid: /proc does not have it
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(LockError, match="is in use by"):
        take(tmp_path, watch_s=50)
    monkeypatch.undo()
    assert take(tmp_path, watch_s=50).hold.generation == 2


def test_a_stopped_owner_of_this_machine_is_not_robbed(tmp_path, holder):
    owner = holder(tmp_path)
    assert owner.line() == "taken 1"
    owner.process.send_signal(signal.SIGSTOP)
    time.sleep(1.1)
    with pytest.raises(LockError, match=r"heartbeat [1-9]\d* s ago"):
        take(tmp_path, watch_s=0.1)


def test_an_owner_elsewhere_is_watched_and_knows_that_it_lost(tmp_path, holder):
    owner = holder(tmp_path)
    assert owner.line() == "taken 1"
    owner.process.send_signal(signal.SIGSTOP)
    edit(tmp_path, host="elsewhere")
    said: list[str] = []
    lock = take(tmp_path, watch_s=0.6, say=said.append)
    assert lock.hold.generation == 2
    assert "elsewhere" in said[0]
    assert "watching for up to 1 s" in said[0]
    owner.process.send_signal(signal.SIGCONT)
    assert owner.ask() == "False False"
    time.sleep(0.3)  # several of its heartbeats
    assert lock.is_ours(), "they went into a file without a name"
    owner.end()
    assert lock.is_ours(), "and so did its release"


def test_a_living_owner_elsewhere_is_seen_by_its_heartbeat_and_not_by_the_clock(tmp_path, holder, monkeypatch):
    owner = holder(tmp_path)
    assert owner.line() == "taken 1"
    monkeypatch.setattr("mixmae.lock._pid_space", lambda: "another container")
    monkeypatch.setattr(time, "time", lambda: 1e6)
    with pytest.raises(LockError, match=r"heartbeat 0 s ago.*\(ssh \S+ kill -INT \d+\)"):
        take(tmp_path, watch_s=30, say=lambda line: None)


@pytest.mark.parametrize("left", ["nothing", "dead owner", "released", "dead claim"])
def test_of_many_at_one_moment_exactly_one_takes_it(tmp_path, holder, left):
    if left != "nothing":
        take(tmp_path).release()
    if left != "released" and left != "nothing":
        edit(tmp_path, released="-" * 24, started_ticks=1.0)
    if left == "dead claim":  # killed between its claim and the lock
        claim = tmp_path / f"{LOCK_FILE}.2"
        claim.write_text((tmp_path / LOCK_FILE).read_text().replace('"generation": 1', '"generation": 2'))
    rivals = [holder(tmp_path, watch_s=20) for _ in range(6)]
    lines = []
    for rival in rivals:
        line = rival.line()
        while line.startswith("note:"):
            line = rival.line()
        lines.append(line)
    winners = [rival for rival, line in zip(rivals, lines, strict=True) if line]
    assert len(winners) == 1, lines
    assert winners[0].ask() == "True True"
    for rival in rivals:
        if rival is not winners[0]:
            said = rival.end()
            assert f"process {winners[0].process.pid}" in said, said
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


def _claim_by(other: Holder, elsewhere: Path, folder: Path) -> Path:
    """A claim on a folder by a living process, which has the lock of another folder."""
    assert other.line() == "taken 1"
    claim = folder / f"{LOCK_FILE}.1"
    claim.write_text((elsewhere / LOCK_FILE).read_text())
    return claim


def test_a_living_claim_that_comes_to_nothing_refuses_nobody(tmp_path, holder):
    claim = _claim_by(holder(tmp_path / "elsewhere"), tmp_path / "elsewhere", tmp_path)
    gone = threading.Timer(0.7, claim.unlink)
    gone.start()
    assert take(tmp_path).hold.generation == 1
    gone.join()


def test_a_claim_that_another_one_makes_the_lock_is_its_makers(tmp_path, monkeypatch):
    """Who claims, and finds its own claim removed as a dead one's, renames what another one has claimed meanwhile."""
    writing = locking._write

    def write(file: int, owner: locking.Owner) -> None:
        writing(file, owner)
        (tmp_path / f"{LOCK_FILE}.1").rename(tmp_path / LOCK_FILE)
        monkeypatch.setattr(locking, "_write", writing)

    monkeypatch.setattr(locking, "_write", write)
    assert take(tmp_path).is_ours()


def test_a_living_claim_that_stays_is_an_owner(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("mixmae.lock.CLAIM_S", 0.5)
    other = holder(tmp_path / "elsewhere")
    claim = _claim_by(other, tmp_path / "elsewhere", tmp_path)
    with pytest.raises(LockError, match=rf"process {other.process.pid}\)"):
        take(tmp_path)
    assert claim.exists()


def test_a_lock_alone_does_not_make_a_folder_somebody_elses(tmp_path):
    take(tmp_path).release()
    (tmp_path / ".partial.123.run.json").write_text("{")
    assert RunFolder(tmp_path).read() is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not a run of this program"):
        RunFolder(tmp_path).read()


def test_a_damaged_lock_is_a_sentence(tmp_path):
    (tmp_path / LOCK_FILE).write_text("{}")
    with pytest.raises(LockError, match=r"damaged: if no run writes to the folder, remove that file"):
        take(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        take(tmp_path / "file" / "run")


@pytest.mark.parametrize("ending", [None, ValueError("no"), KeyboardInterrupt()])
def test_a_command_gives_back_what_it_took_however_it_ends(tmp_path, ending):
    def action(arguments: Path) -> int:
        take(tmp_path)
        if ending is not None:
            raise ending
        return 0

    with contextlib.suppress(SystemExit):
        command(action, int, ["1"], program="", about="")
    assert read_owner(tmp_path).is_released
