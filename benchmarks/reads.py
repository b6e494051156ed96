"""What a sidecar saves: 256 rows of a window of 1024 read exactly, and by whole row groups.

    python benchmarks/reads.py

Writes 220 MB of shards (files of about 107 KB, as ImageNet's) to a temporary folder and prints, for both ways, the
bytes that come from the disk with a cold page cache and the time and CPU time with a warm one. Linux.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mixmae.data.order import Plan
from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
from mixmae.data.source import Source, read_rows
from mixmae.data.sources import open_source, parquet, storage
from mixmae.data.sources.parquet import ParquetSource

FILE_BYTES, SPREAD_BYTES = 107_000, 20_000
SHARDS, ROWS_PER_SHARD = 2, 1024
WINDOW_ROWS, BLOCK_ROWS = 1024, 256
REPEATS = 24


def write(folder: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        images = [
            StoredImage(random.bytes(int(random.normal(FILE_BYTES, SPREAD_BYTES))), f"{row}.jpg", row % 10)
            for row in range(ROWS_PER_SHARD)
        ]
        write_shard(folder / shard_name("train", number, SHARDS), images, shard_schema(None, labelled=True))


def drop_page_cache(folder: Path) -> None:
    parquet._parquet_file.cache_clear()
    storage._local_handle.cache_clear()
    for path in folder.iterdir():
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split(":")[1]) for line in lines if line.startswith("read_bytes"))


def read_block(source: Source, plan: Plan, block: int) -> int:
    rows, _ = plan.rows_at(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
    return sum(len(sample.data) for sample in read_rows(source, rows))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        exact = open_source(name)
        assert isinstance(exact, ParquetSource)
        assert exact.exact_reads
        groups = dataclasses.replace(exact, stamps=(None,) * SHARDS)
        plan = Plan(chunk_sizes=exact.chunk_sizes, seed=1, window_rows=WINDOW_ROWS)
        for title, source in (("row groups", groups), ("exact reads", exact)):
            drop_page_cache(Path(name))
            before, started = bytes_from_disk(), time.perf_counter()
            wanted = read_block(source, plan, 1)
            cold_s, disk = time.perf_counter() - started, bytes_from_disk() - before
            walls, cpus = [], []
            for repeat in range(REPEATS):
                started, cpu = time.perf_counter(), time.process_time()
                read_block(source, plan, repeat)
                walls.append(time.perf_counter() - started)
                cpus.append(time.process_time() - cpu)
            wall, cpu = statistics.median(walls), statistics.median(cpus)
            print(
                f"{title}: {wanted / 1e6:.1f} MB wanted; cold {disk / 1e6:.1f} MB from disk, {cold_s * 1e3:.0f} ms; "
                f"warm {wall * 1e3:.1f} ms wall, {cpu * 1e3:.1f} ms CPU (median)"
            )


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("error: this reads /proc/self/io, which only Linux has")
    main()
