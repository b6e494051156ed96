"""Write the features of every image of a source to Parquet: for search, clustering, and classifiers of your own.

    python pipelines/embed.py WEIGHTS --data SOURCE --output FILE_OR_FOLDER [--split SPLIT] [--workers N]

WEIGHTS is as in pipelines/knn.py. If the output is a file, it gets the rows of one split; if it is a folder, it gets
one file per split. One row per image: `row`, its index in the source; `path`, null where the source does not know it;
`label`, null where there is none; `feature`, the mean of the encoder's last tokens. Images that do not decode are
counted, the first of them named, and left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mixmae.data.broken import NAMED, NothingDecodes, find_broken, name_broken
from mixmae.data.channels import check_channels
from mixmae.data.chunks import Int64Array
from mixmae.data.source import Source
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.storage import writable_folder
from mixmae.inference import (
    REPORT_EVERY_S,
    Embedder,
    EmbeddingWorker,
    FrozenEncoder,
    feature_schema,
    load_frozen,
)
from mixmae.machine import Device
from mixmae.writing import writing
from pipelines.command import command

PART_ROWS = 2048
"""Images whose features make a row group: 8 MB at a width of 1024."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which encoder, which images, where to."""

    weights: tyro.conf.Positional[Path]
    """A run's folder or checkpoint, an encoder file, a hub folder, or weights of other formats."""
    data: str
    """Images, labelled or not: any source in docs/data.md, also a folder of image files."""
    output: Path
    """A file that ends in .parquet, or a folder, which gets SPLIT.parquet for each split."""
    weights_key: str | None = None
    """Which weights, of a file with several sets, such as model_ema or teacher. Default: the trained ones."""
    split: Literal["train", "validation", "test"] | None = None
    """Which part of the data. Default: all splits."""
    overwrite: bool = False
    """Replace files that exist."""
    workers: int = 1
    """Processes that hold the encoder, one per GPU; more than one run on Ray, on all nodes of a cluster."""
    ray_address: str | None = None
    """Ray cluster, if there are several workers. Default: RAY_ADDRESS, else one on this machine."""
    batch_size: int = 64
    """Images per batch."""
    crop_pct: float | None = None
    """Side of the images' central crop over that of the resized image. Default: the file's, else 0.875."""
    device: Device = "auto"
    """Where the encoder runs; auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder; bfloat16 is about twice as fast on a GPU."""


def embed(arguments: Arguments) -> int:
    """Write the files.   Returns: the process's exit status."""
    workers = arguments.workers
    if workers < 1:
        raise ValueError(f"--workers is {workers}: it must be at least 1.")
    targets = choose_targets(arguments)
    load = partial(
        load_frozen,
        arguments.weights.expanduser().resolve(),  # workers may run in another folder
        crop_pct=arguments.crop_pct,
        batch_size=arguments.batch_size,
        bfloat16=arguments.precision == "bfloat16",
        key=arguments.weights_key,
    )
    # Workers load their own encoder, perhaps on GPUs that this process does not have.
    frozen = load(device="cpu" if workers > 1 else arguments.device)
    sources = {split: open_source(arguments.data, split) for split in targets}
    for source in sources.values():
        check_channels(source, frozen.encoder.in_channels)
    for split, target in targets.items():
        source = sources[split]
        start = time.monotonic()
        if workers > 1:
            tables = embed_on_ray(partial(load, device=arguments.device), source, arguments)
        else:
            tables = map(Embedder(frozen, source), parts(source.num_rows, 1))
        with writing(target, overwrite=arguments.overwrite) as unfinished:
            count, missing = write(unfinished, tables, frozen, source)
            broken = find_broken(source, missing)
            if broken and not count:
                raise NothingDecodes(source, broken)
        seconds = time.monotonic() - start
        print(f"{target}: {count} images of {source.name}, {frozen.width} values each, {count / seconds:.0f} images/s")
        if broken:
            print(f"left out: {name_broken(broken, source.num_rows, count=source.num_rows - count)}")
    return 0


def choose_targets(arguments: Arguments) -> dict[str, Path]:
    """The file of each split.   Raises: ValueError for an output that cannot be written, before anything is loaded."""
    there = list_splits(arguments.data)
    splits = (arguments.split,) if arguments.split else there
    writable_folder(arguments.output.parent if arguments.output.suffix == ".parquet" else arguments.output)
    if arguments.output.suffix != ".parquet":
        targets = {split: arguments.output / f"{split}.parquet" for split in splits}
    elif len(splits) == 1:
        targets = {splits[0]: arguments.output}
    else:
        raise ValueError(f"the data have several splits ({', '.join(there)}): name one by --split, or give a folder.")
    taken = [target for target in targets.values() if target.exists() and not arguments.overwrite]
    if taken:
        raise ValueError(f"{taken[0]} is there already: choose another --output, or give --overwrite.")
    return targets


def parts(num_rows: int, workers: int) -> list[Int64Array]:
    """The rows of each row group; small sets are cut so that every worker gets some."""
    size = min(PART_ROWS, -(-num_rows // workers))
    return [np.arange(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def embed_on_ray(load: Callable[[], FrozenEncoder], source: Source, arguments: Arguments) -> Iterator[pa.Table]:
    """The tables of all parts in their order, made by a pool of processes."""
    import ray.data

    from mixmae.training.cluster import join

    workers = arguments.workers
    use_gpu = join(arguments.ray_address, num_workers=workers, device=arguments.device)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    cuts = [{"start": int(rows[0]), "stop": int(rows[-1]) + 1} for rows in parts(source.num_rows, workers)]
    dataset = ray.data.from_items(cuts, override_num_blocks=len(cuts)).map_batches(
        EmbeddingWorker,
        fn_constructor_args=(load, source, workers),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(cuts))),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def write(path: Path, tables: Iterable[pa.Table], frozen: FrozenEncoder, source: Source) -> tuple[int, Sequence[int]]:
    """Write tables as they come, one row group each.

    Returns: the number of rows, and the first of the source's rows that are missing, because they are broken.
    """
    facts: dict[str, Any] = {
        "weights": str(frozen.path),
        "encoder_digest": frozen.digest,
        "run_id": frozen.run_id,
        "preprocessing": {**asdict(frozen.preprocessing), "crop_pct": frozen.crop_pct},
        "width": frozen.width,
        "data": {"name": source.name, "digest": source.digest},
        "class_names": source.class_names,
    }
    schema = feature_schema(frozen.width).with_metadata({"mixmae": json.dumps(facts)})
    count, start = 0, time.monotonic()
    expected = 0
    missing: list[int] = []
    printed = start
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)
            count += len(table)
            if len(table):
                rows = table["row"].to_numpy()
                last = int(rows[-1])
                missing += np.setdiff1d(np.arange(expected, last), rows)[: NAMED - len(missing)].tolist()
                expected = last + 1
            if time.monotonic() - printed > REPORT_EVERY_S:
                printed = time.monotonic()
                rate = count / (printed - start)
                print(f"{source.name}: {count}/{source.num_rows} images, {rate:.0f} images/s", flush=True)
        writer.add_key_value_metadata({"mixmae.broken": str(source.num_rows - count)})  # known only now
    missing += range(expected, source.num_rows)[: NAMED - len(missing)]
    return count, missing


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(embed, Arguments, argv, program="embed.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
