"""Turn any collection of images, or a built-in set, into Parquet shards that every other command reads.

    python pipelines/make_shards.py SOURCE OUTPUT

Images keep their pixels and are stored in shuffled order. Folders named after classes become labels; without a
validation split about 1 percent of the images (8 to 1000) are held out as one. An interrupted run continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from mixmae.data.shards.pack import ShardJob, WriteJob, WrittenShard, make_shards, run_in_threads
from pipelines.command import command


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of images (flat, nested, one folder per class, or train/ and val/ with these inside), of WebDataset tars
    or of Parquet files; iNaturalist, Places205 or Places365 as unpacked; a list of files (.txt); a glob; a JSON list of
    sources; images with masks (docs/segmentation.md) or objects
    (docs/detection.md); a URI such as s3://bucket/prefix; or a built-in set: "moths"
    ("moths:0.6" for another difficulty), "shapes" or "scenes"."""
    output: Annotated[str, tyro.conf.Positional]
    """Local folder for the shards and their manifest.json; made if it is missing."""
    shard_mb: float = 128.0
    """Aim for the size of a shard in megabytes."""
    resize_longer_side: int | None = None
    """Shrink images whose longer side has more pixels (JPEG quality 95, 4:2:0); others stay."""
    tiles: bool | None = None
    """Store restart-tile JPEGs: lossless, and a crop decodes only the tiles it touches. Default: if jpegtran is
    installed."""
    seed: int = 0
    """Of the shuffle and of the choice of held-out images."""
    workers: int = 0
    """Shards written at once; 0 means one per core."""
    ray_address: str | None = None
    """Write on this Ray cluster ("auto", "local", host:port) instead of in threads; OUTPUT, and a local SOURCE, must be
    on a disk that its nodes share."""
    overwrite: bool = False
    """Replace the shards that are in the output folder."""


def run_on_ray(write: WriteJob, jobs: Sequence[ShardJob], workers: int) -> Iterator[tuple[ShardJob, WrittenShard]]:
    """Run the jobs on the Ray cluster that this process has joined, one task per shard."""
    import ray

    task: Any = ray.remote(num_cpus=1, max_retries=3)(lambda job: write(job))
    waiting = list(reversed(jobs))
    limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, ShardJob] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            job = waiting.pop()
            running[task.remote(job)] = job
        ready, _ = ray.wait(list(running), num_returns=1)
        yield running.pop(ready[0]), ray.get(ready[0])


def run(arguments: Arguments) -> int:
    """Pack the source, in threads or on Ray.   Returns: the process's exit status."""
    if arguments.ray_address is not None:
        from mixmae.training.cluster import connect

        connect(arguments.ray_address, num_workers=0)
    make_shards(
        arguments.source,
        arguments.output,
        shard_mb=arguments.shard_mb,
        resize_longer_side=arguments.resize_longer_side,
        tiles=arguments.tiles,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        run_jobs=run_in_threads if arguments.ray_address is None else run_on_ray,
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="make_shards.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
