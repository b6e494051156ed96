"""The data plane on a real Ray: what it delivers is what the plan says, whoever asks and from wherever."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import ray
import torch
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from benchmarks.drilling.deadly import DeadlySource
from mixmae.data.blocks import ImageBatch, local_batches
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.order import Plan
from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import Source
from mixmae.data.sources import open_source
from mixmae.data.stream_config import StreamConfig
from mixmae.data.streams import TrainStream
from mixmae.share import WorkerShare
from tests.factories import jpeg

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

AUGMENT = AugmentConfig(image_size=32)
NUM_ROWS, BROKEN_ROW = 150, 77


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, address="local", include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("shards")
    files = [jpeg(row) for row in range(NUM_ROWS)]
    files[BROKEN_ROW] = files[BROKEN_ROW][:200]
    images = [StoredImage(data, f"{row}.jpg", row % 5) for row, data in enumerate(files)]
    write_shard(folder / shard_name("train", 0, 1), images, shard_schema(list("abcde")))
    return open_source(folder)


@pytest.fixture(scope="module")
def plan(source: Source) -> Plan:
    return Plan(chunk_sizes=source.chunk_sizes, seed=4, window_rows=64)


def images_of(batches: list[ImageBatch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


ONE_SEGMENT = StreamConfig(target_block_images=16, segment_blocks=200, prefetch_blocks=2)
SIXTEEN = WorkerShare(batch_size=16)
SMALL = StreamConfig(target_block_images=16, segment_blocks=5, prefetch_blocks=2)


class IdleSteps(ExecutionCallback):
    """When the scheduling loop of the one stream made the last steps, one after the other, without a running task."""

    times: ClassVar[list[float]] = []
    reached: ClassVar[threading.Event] = threading.Event()
    """There were 100 of them."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        if self.reached.is_set():
            return
        if any(operator.num_active_tasks() for operator in executor._topology or {}):
            self.times.clear()
        self.times.append(time.monotonic())
        if len(self.times) == 100:
            self.reached.set()


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.usefixtures("cluster")
class TestStream:
    def test_the_scheduling_loop_rests_while_nobody_reads(self, source, plan, monkeypatch):
        """While blocks wait to be read and no task runs, Ray Data's loop makes fewer than 200 steps per second."""
        monkeypatch.setattr(DataContext.get_current(), "custom_execution_callback_classes", [IdleSteps])
        with contextlib.closing(
            TrainStream(source, plan, AUGMENT, share=SIXTEEN, stop_step=200, config=ONE_SEGMENT)
        ) as stream:
            batches = iter(stream)  # kept: dropping it would end the stream
            next(batches)
            assert IdleSteps.reached.wait(timeout=60)
        assert IdleSteps.times[-1] - IdleSteps.times[0] > len(IdleSteps.times) / 200

    @pytest.mark.parametrize("channels", [1, 3])
    def test_it_delivers_what_the_plan_says(self, source, plan, channels):
        """Over three epochs and many segments, with accumulation: identical to the plain loop without Ray."""
        share = WorkerShare(batch_size=32, micro_batch_size=8)
        options = {"share": share, "stop_step": 15, "channels": channels}
        streamed = list(TrainStream(source, plan, AUGMENT, config=SMALL, **options))
        expected = list(local_batches(source, plan, AUGMENT, **options))
        assert [batch.images.shape for batch in streamed] == 60 * [(8, channels, 32, 32)]
        assert torch.equal(images_of(streamed), images_of(expected))
        for name in ("rows", "labels", "epochs"):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(streamed, expected, strict=True))
        assert [batch.broken for batch in streamed] == [batch.broken for batch in expected]
        rows = torch.cat([batch.rows for batch in streamed])
        epochs = torch.cat([batch.epochs for batch in streamed])
        for epoch in range(3):
            assert sorted(rows[epochs == epoch].tolist()) == list(range(NUM_ROWS))
        found = [record for batch in streamed for record in batch.broken]
        assert len(found) == int((rows == BROKEN_ROW).sum()) >= 3
        assert {record.row for record in found} == {BROKEN_ROW}
        assert found[0].where.endswith(f"train-00000-of-00001.parquet#{BROKEN_ROW} / {BROKEN_ROW}.jpg")

    def test_two_workers_at_once_see_what_one_would(self, source, plan):
        def worker(rank: int) -> list[ImageBatch]:
            share = WorkerShare(batch_size=24, rank=rank, num_workers=2)
            return list(TrainStream(source, plan, AUGMENT, share=share, stop_step=12, config=SMALL))

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(worker, range(2))
        together = [batch.images for pair in zip(first, second, strict=True) for batch in pair]
        alone = list(local_batches(source, plan, AUGMENT, share=WorkerShare(batch_size=24), stop_step=12))
        assert torch.equal(torch.cat(together), images_of(alone))

    def test_a_resumed_stream_continues_with_the_next_image(self, source, plan):
        options = {"share": SIXTEEN, "stop_step": 12, "config": SMALL}
        broken_off = TrainStream(source, plan, AUGMENT, **options)
        before = [batch for _, batch in zip(range(7), broken_off, strict=False)]
        broken_off.close()
        after = list(TrainStream(source, plan, AUGMENT, start_step=7, **options))
        whole = list(local_batches(source, plan, AUGMENT, share=SIXTEEN, stop_step=12))
        assert torch.equal(images_of(before + after), images_of(whole))
        assert after[0].rows.tolist() == plan.rows_at(7 * 16, 8 * 16)[0].tolist()

    def test_a_micro_batch_may_be_larger_than_a_block(self, source, plan):
        options = {"share": WorkerShare(batch_size=40), "stop_step": 3}
        streamed = list(TrainStream(source, plan, AUGMENT, config=SMALL, **options))
        expected = list(local_batches(source, plan, AUGMENT, **options))
        assert torch.equal(images_of(streamed), images_of(expected))
        assert [batch.broken for batch in streamed] == [batch.broken for batch in expected]

    @pytest.mark.parametrize("when", ["once", "always"])
    def test_an_image_that_kills_the_decoder(self, source, plan, tmp_path, when):
        """Once: nothing is lost. Each time: it is a broken image, and all others are as they would be beside it."""
        row = int(plan.rows_at(20, 21)[0][0])
        deadly = DeadlySource(source, row, when, str(tmp_path / when))
        beside = source if when == "once" else DeadlySource(source, row, "broken", str(tmp_path / "broken"))
        streamed = list(TrainStream(deadly, plan, AUGMENT, share=SIXTEEN, stop_step=4, config=SMALL))
        expected = list(local_batches(beside, plan, AUGMENT, share=SIXTEEN, stop_step=4))
        assert (tmp_path / when).exists()
        assert torch.equal(images_of(streamed), images_of(expected))
        found, known = ([record for batch in side for record in batch.broken] for side in (streamed, expected))
        assert [record.row for record in found] == [record.row for record in known]
        assert [record.reason for record in found if record.row == row] == (
            [] if when == "once" else ["the process that decodes it ends (SIGKILL)"]
        )

    def test_closing_stops_the_tasks(self, source, plan):
        stream = TrainStream(source, plan, AUGMENT, share=SIXTEEN, stop_step=100_000)
        next(iter(stream))
        stream.close()
        total = ray.cluster_resources()["CPU"]
        wait_until(lambda: ray.available_resources().get("CPU", 0) == total)

    def test_a_vanished_shard_raises_in_the_loop(self, source, plan, tmp_path):
        moved = tmp_path / "train.parquet"
        moved.write_bytes(Path(source.files[0]).read_bytes())
        lost = open_source(tmp_path)
        moved.unlink()
        stream = TrainStream(lost, plan, AUGMENT, share=SIXTEEN, stop_step=5, config=SMALL)
        with pytest.raises(Exception, match="cannot be read any more"):
            list(stream)

    def test_a_worker_killed_at_any_step_continues_with_the_very_next_image(self, source, plan, tmp_path):
        """Killed in or after step 7, wherever it is; the file that it writes tells how far it came. Two workers take
        over from one."""
        seen = tmp_path / "seen"

        @ray.remote(num_cpus=0)
        class Worker:
            def run(self, rank: int, num_workers: int, start_step: int) -> list[tuple[int, bytes]]:
                share = WorkerShare(batch_size=16, micro_batch_size=8, rank=rank, num_workers=num_workers)
                stream = TrainStream(
                    source, plan, AUGMENT, share=share, start_step=start_step, stop_step=24, config=SMALL
                )
                found = []
                for number, batch in enumerate(stream):
                    if num_workers == 1:
                        with seen.open("ab") as log:
                            log.write(np.append(batch.rows, batch.images.sum(dim=(1, 2, 3))).astype(np.int64).tobytes())
                    found.append((number, batch.images.numpy().tobytes()))
                return found

        first = Worker.remote()
        running = first.run.remote(0, 1, 0)
        kill_at = 7
        record_bytes = 2 * 8 * 8
        wait_until(lambda: seen.exists() and seen.stat().st_size >= kill_at * 2 * record_bytes)
        ray.kill(first)
        with pytest.raises(ray.exceptions.RayError):
            ray.get(running)
        step = seen.stat().st_size // record_bytes // 2
        assert step >= kill_at

        expected = list(local_batches(source, plan, AUGMENT, share=SIXTEEN, stop_step=24))
        records = np.frombuffer(seen.read_bytes(), dtype=np.int64)[: step * 2 * 16].reshape(step, 2, 2, 8)
        for batch, record in zip(expected[:step], records, strict=True):
            assert batch.rows.tolist() == record[:, 0].ravel().tolist()
            assert batch.images.sum(dim=(1, 2, 3)).tolist() == record[:, 1].ravel().tolist()
        heirs = [Worker.remote().run.remote(rank, 2, step) for rank in range(2)]
        parts = [ray.get(heir) for heir in heirs]
        for number, batch in enumerate(expected[step:]):
            halves = [part[number][1] for part in parts]
            assert b"".join(halves) == batch.images.numpy().tobytes()

    def test_nothing_to_do(self, source, plan):
        assert list(TrainStream(source, plan, AUGMENT, share=SIXTEEN, start_step=3, stop_step=3)) == []


SMALL_STORE = """
import os, sys, time
from pathlib import Path
import ray
from benchmarks.ingest import Meter
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.order import Plan
from mixmae.data.sources import open_source
from mixmae.data.streams import TrainStream
from mixmae.share import WorkerShare

ray.init(address="local", num_cpus=2, object_store_memory=150_000_000, include_dashboard=False, logging_level="ERROR")
source = open_source(sys.argv[1])
plan = Plan(chunk_sizes=source.chunk_sizes)
options = dict(share=WorkerShare(batch_size=64), stop_step=80)
count = 0
for batch in TrainStream(source, plan, AugmentConfig(), **options):
    if count == 0:
        time.sleep(4)  # all that may be decoded ahead, is
    count += batch.images.nbytes
print("MB", count // 10**6)
own, store = Meter(os.getpid()).memory_mb()
session = Path(ray._private.worker._global_node.get_session_dir_path())
print("store touched", int(store))
print("spilled", "Spilled" in (session / "logs" / "raylet.out").read_text())
"""


@pytest.mark.slow
def test_a_set_larger_than_the_object_store_streams_through_it(source):
    """770 MB of batches through a store of 150 MB on two CPUs, the reader being slow at first: nothing is spilled."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STORE, str(Path(source.files[0]).parent)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MB 770" in done.stdout
    assert "spilled False" in done.stdout
    # The store's pages stay touched once they are, so this is a peak.
    assert int(done.stdout.split("store touched ")[1].split()[0]) < 165
