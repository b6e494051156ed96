"""make_shards on a Ray cluster: the same files as without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmae.data.shards.pack import make_shards
from pipelines.make_shards import run_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def test_ray_writes_the_same_shards(photos, tmp_path):
    import ray

    lines: list[str] = []
    ray.init(num_cpus=4, address="local", include_dashboard=False, logging_level="ERROR")
    try:
        made = make_shards(photos, tmp_path / "ray", shard_mb=0.03, run_jobs=run_on_ray, report=lines.append)
    finally:
        ray.shutdown()
    here = make_shards(photos, tmp_path / "here", shard_mb=0.03)
    assert len(list(made.folder.glob("*.parquet"))) > 4
    assert contents(made.folder) == contents(here.folder)
    assert sum("images" in line for line in lines) > 4
