"""A run's folder in a store, with a real S3 server: files, checkpoints, the journal, the lock, and outages."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mixmae import lock
from mixmae.tracking import Journal, Reader
from mixmae.training import mirror as mirrors
from mixmae.training import store_lock
from mixmae.training.checkpoint import load_checkpoint, save_checkpoint, verify
from mixmae.training.mirror import Mirror
from mixmae.training.run_folder import RunFolder, stem_of, weights_of
from mixmae.training.run_store import DamagedCopy, RunStore, StoreError, merged, part_of
from tests.s3_server import BUCKET, S3Server, serve_s3

pytestmark = pytest.mark.timeout(120)
_COUNT = itertools.count()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def server(shared_server: S3Server) -> Iterator[S3Server]:
    yield shared_server
    lock.release_all()
    if shared_server._server is None:
        shared_server.start()


@pytest.fixture
def run(server: S3Server) -> str:
    """The name of a run that there is not yet."""
    return f"run{next(_COUNT)}"


@pytest.fixture
def machine(server: S3Server, run: str, tmp_path: Path) -> Callable[[str], RunStore]:
    """The store as a machine of this name sees it."""

    def see(name: str) -> RunStore:
        store = RunStore.of(server.uri(run), tmp_path / name)
        assert store is not None
        return store

    return see


def save(store: RunStore, step: int, value: float | None = None) -> Path:
    """Write a checkpoint in a staging folder."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step if value is None else value)
    path = store.local / "checkpoints" / f"step_{step:07d}"
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(path, model=model, optimizer=optimizer, state={"position": {"step": step}})
    return path


def weight_of(folder: Path) -> float:
    model = nn.Linear(3, 2)
    load_checkpoint(folder, model=model)
    return float(model.weight[0, 0].detach())


def test_what_a_command_line_names(server, run, tmp_path):
    uri = server.uri(run)
    store = RunStore.of(Path(uri), tmp_path)  # a Path has lost a slash
    assert store is not None
    assert store.shown == f"s3://{BUCKET}/{run}"
    assert pickle.loads(pickle.dumps(store)).read("x") is None
    assert store.local.parent == tmp_path
    other = RunStore.of(uri.replace(run, f"other/{run}"), tmp_path)
    assert other is not None
    assert other.local != store.local
    assert RunStore.of(tmp_path / "run") is None
    assert stem_of(Path(uri)) == run
    with pytest.raises(ValueError, match="without file://"):
        RunStore.of("file:///x")
    with pytest.raises(ValueError, match="cannot be opened"):
        RunStore.of("nosuch://bucket/x")


def test_parts_of_a_run():
    parts = {
        "run.json": "driver", "left_0_at_step_5/metrics.jsonl": "driver", "initial.safetensors": "driver",
        "checkpoints/step_1/state.json": "worker", "best/state.json": "worker", "panels/step_1.png": "worker",
        "stacks_rank1.txt": "worker", "metrics.jsonl": "journal", "run.lock": None, "run.lock.3": None,
        ".mark.driver": None, "panels/.partial.1.step_1.png": None, ".uploading/step_1/state.json": None,
    }  # fmt: skip
    assert {name: part_of(name) for name in parts} == parts


@pytest.mark.parametrize(
    ("theirs", "ours", "both"),
    [
        (b"a\nb\n", b"a\nb\nc\n", b"a\nb\nc\n"),
        (b"a\nb\nc\n", b"a\nb\n", b"a\nb\nc\n"),
        (b"", b"a\n", b"a\n"),
        (b"a\n", b"", b"a\n"),
        (b"a\nb\nx\n", b"a\nb\ny\n", b"a\nb\nx\ny\n"),
        (b"a\nbx\n", b"a\nby\n", b"a\nbx\nby\n"),
        (b"other\nb\n", b"a\nb\n", b"other\nb\n"),
    ],
)
def test_two_copies_of_a_journal(theirs, ours, both):
    assert merged(theirs, ours) == both


def test_an_empty_machine_goes_on_where_another_one_was_lost(server, run, machine, tmp_path):
    one = machine("one")
    one.bring("driver")
    one.bring("worker")
    Journal(one.local).add_points({"x": 1.0}, 1)
    (one.local / "run.json").write_text("{}")
    (one.local / "panels").mkdir()
    (one.local / "panels" / "step_0000001.png").write_bytes(b"png")
    with Mirror(one, "driver") as driver, Mirror(one, "worker", keep=2):
        driver.owns_journal = False
        for step in (10, 20, 30):
            save(one, step)
            deadline = time.monotonic() + 30
            while f"checkpoints/step_{step:07d}/state.json" not in server.names(run):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    names = server.names(run)
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"step_0000020", "step_0000030"}
    assert {"run.json", "metrics.jsonl", "panels/step_0000001.png"} <= names
    assert not any(".uploading" in name or ".partial" in name for name in names)

    two = machine("two")
    two.bring("driver")
    two.bring("worker")
    assert (two.local / "run.json").read_text() == "{}"
    assert (two.local / "panels" / "step_0000001.png").read_bytes() == b"png"
    assert (two.local / "metrics.jsonl").read_bytes() == (one.local / "metrics.jsonl").read_bytes()
    assert two.checkpoints() == ["step_0000030", "step_0000020"]
    path = two.local / "checkpoints" / "step_0000030"
    two.get_folder("checkpoints/step_0000030", path)
    verify(path)
    assert weight_of(path) == 30
    # The first machine is back: what it has is old, and it may not copy it any more.
    assert not one.has("worker")
    save(one, 40)
    with Mirror(one, "worker") as late:
        assert late._stopped.wait(20)
    assert two.checkpoints() == ["step_0000030", "step_0000020"]
    one.bring("worker")
    assert not (one.local / "checkpoints").exists()


def test_a_machine_that_was_the_last_to_write_keeps_what_the_store_has_not_got(machine):
    one = machine("one")
    one.bring("worker")
    Journal(one.local).add_points({"x": 1.0}, 1)
    Mirror(one, "worker").push()
    save(one, 10)
    Journal(one.local).add_points({"x": 2.0}, 2)  # and it is killed here
    one.bring("worker")
    assert (one.local / "checkpoints" / "step_0000010").is_dir()
    assert [entry["step"] for entry, _ in Reader(one.local).read()] == [1, 2]


def test_an_upload_that_breaks_off_leaves_no_checkpoint(server, run, machine, monkeypatch):
    one = machine("one")
    one.bring("worker")
    Journal(one.local).add_points({"x": 1.0}, 10)
    save(one, 10)
    put = RunStore.put

    def break_off(store: RunStore, file: Path, name: str) -> None:
        if name.startswith("checkpoints/"):
            assert server.read(f"{run}/metrics.jsonl").count(b"\n") == 1
        if name.endswith("optimizer.pt"):
            raise StoreError("it is gone")
        put(store, file, name)

    monkeypatch.setattr(RunStore, "put", break_off)
    mirror = Mirror(one, "worker")
    with pytest.raises(StoreError):
        mirror.push()
    assert one.checkpoints() == []
    monkeypatch.undo()
    mirror.push()
    assert one.checkpoints() == ["step_0000010"]
    # Whoever replaces one takes it away first.
    shutil.rmtree(save(one, 10))
    path = save(one, 10, value=5)
    monkeypatch.setattr(RunStore, "put", break_off)
    with pytest.raises(StoreError):
        one.put_folder(path, "checkpoints/step_0000010")
    assert one.checkpoints() == []


def test_a_checkpoint_without_state_does_not_count_and_is_cleared_away(server, run, machine):
    one = machine("one")
    one.bring("worker")
    path = save(one, 10)
    one.put_folder(path, "checkpoints/step_0000010")
    one.put(path / "model.safetensors", "checkpoints/step_0000007/model.safetensors")  # killed while it was copied
    assert one.checkpoints() == ["step_0000010"]
    one.remove_older(3)
    assert not any("step_0000007" in name for name in server.names(run))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_bit_that_flips_in_the_store_is_found(server, run, machine, name):
    one = machine("one")
    one.bring("worker")
    one.put_folder(save(one, 10), "checkpoints/step_0000010")
    content = bytearray(server.read(f"{run}/checkpoints/step_0000010/{name}"))
    content[len(content) // 2] ^= 1
    server.write(f"{run}/checkpoints/step_0000010/{name}", bytes(content))
    target = machine("two").local / "checkpoints" / "step_0000010"
    with pytest.raises(DamagedCopy, match=rf"s3://{BUCKET}/{run}/checkpoints/step_0000010 is damaged"):
        one.get_folder("checkpoints/step_0000010", target)
    assert not target.exists()


def test_the_store_is_away_and_comes_back(server, run, machine, monkeypatch):
    monkeypatch.setattr(mirrors, "LONGEST_PAUSE_S", 0.5)
    one = machine("one")
    one.bring("worker")
    said: list[str] = []
    with Mirror(one, "worker", keep=2, say=said.append) as mirror:
        save(one, 10)
        while "step_0000010" not in mirror.uploaded:
            time.sleep(0.05)
        server.stop()
        for step in (20, 30, 40):
            start = time.monotonic()
            Journal(one.local).add_points({"x": 1.0}, step)
            save(one, step)
            assert time.monotonic() - start < 2, "nobody waits for the store"
        deadline = time.monotonic() + 60
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        threading.Timer(3, server.start).start()
    assert one.checkpoints() == ["step_0000040", "step_0000010"]
    assert len(said) == 2, said
    assert f"s3://{BUCKET}/{run} gives no answer" in said[0]
    assert "check the address, the credentials and the endpoint. Training goes on" in said[0]
    assert said[1] == f"s3://{BUCKET}/{run} answers again"
    assert server.read(f"{run}/metrics.jsonl").count(b"\n") == 3


def test_patience_ends(server, machine):
    one = machine("one")
    one.bring("worker")
    save(one, 10)
    server.stop()
    start = time.monotonic()
    with pytest.raises(StoreError, match="check the address"), Mirror(one, "worker", patience_s=2, say=lambda _: None):
        pass
    assert time.monotonic() - start < 40


def test_the_journal_goes_from_the_driver_to_rank_0_on_another_node_and_back(machine, monkeypatch):
    monkeypatch.setattr(mirrors, "PUSH_S", 0.0)
    here, there = machine("driver's node"), machine("rank 0's node")
    here.bring("driver")
    Journal(here.local).add(run={}, key="k")
    driver = Mirror(here, "driver")
    driver.start_journal()
    driver.owns_journal = False
    there.bring("worker")
    with driver:
        with Mirror(there, "worker"):
            Journal(there.local).add_points({"x": 1.0}, 1)
            deadline = time.monotonic() + 30
            while len(Reader(here.local).read()) < 2:  # for MLflow
                assert time.monotonic() < deadline
                time.sleep(0.05)
            Journal(there.local).add_points({"x": 1.0}, 2)
            (there.local / "best").mkdir()
            (there.local / "best" / "state.json").write_text("{}")
        driver.take_journal()
        driver.bring_results()
        Journal(here.local).add(status="FINISHED")
    assert [set(entry) - {"time"} for entry, _ in Reader(here.local).read()] == [
        {"run", "key"}, {"step", "metrics"}, {"step", "metrics"}, {"status"}
    ]  # fmt: skip
    assert (here.local / "metrics.jsonl").read_bytes() == here.read("metrics.jsonl")
    assert (here.local / "best" / "state.json").exists()


class TestLock:
    def test_a_living_owner_is_named_and_a_dead_one_is_succeeded(self, server, run, machine, monkeypatch):
        one = machine("one")
        first = store_lock.take(one, heartbeat_s=0.1, settle_s=0.1)
        assert store_lock.take(one) is first, "a process is not its own rival"
        assert lock.holds(*first.hold)
        lock.held.clear()
        assert lock.holds(*pickle.loads(pickle.dumps(first.hold))), "as a worker asks"
        with pytest.raises(lock.InUse, match=rf"s3://{BUCKET}/{run} is in use by .* choose another --output"):
            store_lock.take(machine("two"), settle_s=0.1)
        first.release()
        assert not lock.holds(*first.hold)
        second = store_lock.take(one, settle_s=0.1, say=pytest.fail)
        assert second.hold.generation == 2

    def test_an_owner_elsewhere_is_watched(self, server, run, machine, monkeypatch):
        monkeypatch.setattr("mixmae.lock._pid_space", lambda: "elsewhere")
        first = store_lock.take(machine("one"), heartbeat_s=0.2, settle_s=0.1)
        lock.held.clear()
        monkeypatch.setattr("mixmae.lock._pid_space", lambda: "here")
        with pytest.raises(lock.InUse, match="is in use by"):
            store_lock.take(machine("two"), watch_s=5, settle_s=0.1, say=lambda _: None)
        first._done.set()  # it dies
        first._thread.join()
        said: list[str] = []
        second = store_lock.take(machine("two"), watch_s=1, settle_s=0.1, say=said.append)
        assert second.hold.generation == 2
        assert "watching for up to 1 s" in said[0]
        assert "which is gone, was taken over" in said[1]

    def test_who_was_taken_for_dead_notices_and_leaves_the_lock_alone(self, machine):
        one = machine("one")
        first = store_lock.take(one, heartbeat_s=0.2, settle_s=0.1)
        content = json.loads(one.read("run.lock")) | {"generation": 2, "token": "x" * 16, "host": "cloud"}
        one.write("run.lock", json.dumps(content).encode())
        deadline = time.monotonic() + 20
        while lock.holds(*first.hold):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sentence = str(lock.taken_over(*first.hold))
        assert f"{one.shown} was taken over by {content['user']} on cloud" in sentence
        first.release()
        assert json.loads(one.read("run.lock")) == content

    def test_of_many_at_one_moment_one_has_it(self, machine):
        stores = [machine(f"machine {number}") for number in range(5)]
        outcomes: list[object] = []

        def attempt(store: RunStore) -> None:
            lock.held.pop(store.uri, None)
            try:
                outcomes.append(store_lock.take(store, settle_s=1.5))
            except lock.InUse as error:
                outcomes.append(error)

        threads = [threading.Thread(target=attempt, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [item for item in outcomes if isinstance(item, store_lock.StoreLock)]
        assert len(winners) == 1, outcomes

    def test_an_outage_says_nothing_about_the_lock(self, server, machine):
        one = machine("one")
        held = store_lock.take(one, heartbeat_s=0.1, settle_s=0.1)
        server.stop()
        time.sleep(1)
        assert lock.holds(*held.hold)
        lock.held.clear()
        with pytest.raises(OSError, match="gives no answer"):
            lock.holds(*held.hold)
        server.start()


class TestFolder:
    def test_the_record_is_read_there_before_the_lock_and_here_after_it(self, server, run, machine, tmp_path):
        folder = RunFolder(Path(server.uri(run)), tmp_path / "one")
        assert folder.read() is None
        server.write(f"{run}/run.json", b'{"status": "running"}')
        assert folder.read() == {"status": "running", "config": {}}
        assert not (folder.path / "run.json").exists()
        folder.bring()
        folder.write({"status": "finished"})
        assert folder.read() == {"status": "finished", "config": {}}
        assert folder.shown() == f"s3://{BUCKET}/{run}"
        assert folder.shown(folder.ledger) == f"s3://{BUCKET}/{run}/broken_images.jsonl"
        server.write(f"{run}/run.json", b"{")
        with pytest.raises(ValueError, match=rf"s3://{BUCKET}/{run}/run.json is damaged"):
            RunFolder(Path(server.uri(run)), tmp_path / "two").read()

    def test_something_elses_folder_is_refused(self, server, run, tmp_path):
        server.write(f"{run}/thesis.tex", b"x")
        with pytest.raises(ValueError, match=rf"s3://{BUCKET}/{run} is not empty and not a run"):
            RunFolder(Path(server.uri(run)), tmp_path).read()

    def test_what_is_put_aside_is_put_aside_there(self, server, run, machine, tmp_path):
        one = machine("one")
        for part in ("driver", "worker"):
            one.bring(part)
        Journal(one.local).add(run={}, key="k")
        (one.local / "panels").mkdir()
        for step in (10, 20):
            save(one, step)
            one.put_folder(one.local / "checkpoints" / f"step_{step:07d}", f"checkpoints/step_{step:07d}")
            (one.local / "panels" / f"step_{step:07d}.png").write_bytes(b"png")
        Mirror(one, "worker").push()
        folder = RunFolder(Path(server.uri(run)), tmp_path / "two")
        folder.bring()
        aside = folder.put_aside(10)
        assert one.checkpoints() == ["step_0000010"]
        names = server.names(run)
        assert {
            f"{aside.name}/metrics.jsonl",
            f"{aside.name}/panels/step_0000020.png",
            f"{aside.name}/checkpoints/step_0000020/state.json",
            f"{aside.name}/checkpoints/step_0000020/model.safetensors",
            "panels/step_0000010.png",
        } <= names
        assert not {"metrics.jsonl", "panels/step_0000020.png"} & names
        assert not one.has("worker"), "the old branch's staging folder would be taken for newer"
        other = RunFolder(Path(server.uri(run)), tmp_path / "three")
        other.bring()
        assert [path.name for path in other.left] == [aside.name]

    def test_weights_of_a_run_in_a_store(self, server, run, machine, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        one, place = machine("one"), Path(server.uri(run))
        with pytest.raises(FileNotFoundError, match="is not there"):
            weights_of(place)
        one.write("run.json", b"{}")
        with pytest.raises(ValueError, match="without a checkpoint yet"):
            weights_of(place)
        for step in (10, 20):
            one.put_folder(save(one, step), f"checkpoints/step_{step:07d}")
        assert weight_of(weights_of(place)) == 20
        assert weight_of(weights_of(Path(server.uri(f"{run}/checkpoints/step_0000010")))) == 10
        one.put_folder(save(one, 10, value=7), "best")
        assert weight_of(weights_of(place)) == 7
        one.put_folder(save(one, 10, value=8), "best")
        assert weight_of(weights_of(place)) == 8, "a newer one of the same name"
        file = weights_of(Path(server.uri(f"{run}/best/model.safetensors")))
        assert file.read_bytes() == server.read(f"{run}/best/model.safetensors")
        shutil.rmtree(tmp_path / "cache")
