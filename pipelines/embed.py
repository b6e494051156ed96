"""Write the features of every image of a source to Parquet: for search, clustering, and classifiers of one's own.

    python pipelines/embed.py WEIGHTS --data SOURCE --output FILE_OR_FOLDER [--split SPLIT] [--workers N]

WEIGHTS is as in pipelines/knn.py. A file gets the rows of one split; in a folder each split gets a file. One row an
image: `row`, its number in the source; `path`, where the source knows it; `label`, null where there is none; `feature`,
the mean of the encoder's last tokens. Images that do not decode are counted and left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from mixmae.data.chunks import Int64Array
from mixmae.data.images.augment import centre_crop
from mixmae.data.images.decode import DecodeError, Uint8Array, decode_rgb
from mixmae.data.source import Sample, Source, read_rows
from mixmae.data.sources.open import list_splits, open_source
from mixmae.data.sources.storage import writable_folder
from mixmae.writing import writing
from pipelines.console import fail
from pipelines.features import SAY_EVERY_S, FrozenEncoder, ahead, load_frozen

PART_ROWS = 2048
"""Images whose features make a row group: 8 MB at a width of 1024."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: which encoder, which images, where to."""

    weights: tyro.conf.Positional[Path]
    """A run's folder or checkpoint, an encoder file, a hub folder, others' weights."""
    data: str
    """Images, labelled or not: anything that docs/data.md lists, a folder of files included."""
    output: Path
    """A file that ends in .parquet, or a folder, which gets SPLIT.parquet for each split."""
    split: Literal["train", "validation", "test"] | None = None
    """Which part of the data. Default: all there are."""
    overwrite: bool = False
    """Replace files that are there."""
    workers: int = 1
    """Processes that hold the encoder, one a GPU; more than one run on Ray, on all nodes of a cluster."""
    ray_address: str | None = None
    """Ray cluster, where workers are several. Default: RAY_ADDRESS, else one on this machine."""
    batch_size: int = 64
    """Images that are looked at at once."""
    resize_share: float = 0.875
    """Side of the images' central crop over that of the whole."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the encoder runs; auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder; bfloat16 is about twice as fast on a GPU."""

    def load(self) -> FrozenEncoder:
        return load_frozen(
            self.weights,
            device=self.device,
            resize_share=self.resize_share,
            batch_size=self.batch_size,
            bfloat16=self.precision == "bfloat16",
        )


@dataclass(frozen=True)
class _Pictures:
    """Decoded images of a batch: a LabelledBatch, and where each was found."""

    images: torch.Tensor
    labels: torch.Tensor
    samples: list[tuple[int, Sample]]
    """(row, what was stored there) of each."""


class Embedder:
    """An encoder that turns rows of a source into a table of features."""

    def __init__(self, frozen: FrozenEncoder, source: Source, neighbours: int = 1) -> None:
        """neighbours: processes, this one included, that may decode on the same cores."""
        self._frozen, self._source = frozen, source
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // neighbours), "decode")

    def __call__(self, rows: Int64Array) -> pa.Table:
        """The features of these rows, in order; of those that decode."""
        step = self._frozen.batch_size
        loaded = (self._load(rows[start : start + step]) for start in range(0, len(rows), step))
        batches = list(self._encoded(ahead(loaded)))
        return pa.concat_tables(batches) if batches else schema_of(self._frozen.width).empty_table()

    def _load(self, rows: Int64Array) -> _Pictures:
        samples = read_rows(self._source, rows)
        pictures = list(self._pool.map(self._decode, samples))
        kept = [
            (picture, row, sample)
            for picture, row, sample in zip(pictures, rows.tolist(), samples, strict=True)
            if picture is not None
        ]
        images = np.stack([picture for picture, _, _ in kept]) if kept else np.empty(0, dtype=np.uint8)
        labels = torch.tensor([sample.label for _, _, sample in kept], dtype=torch.int64)
        return _Pictures(torch.from_numpy(images), labels, [(row, sample) for _, row, sample in kept])

    def _decode(self, sample: Sample) -> Uint8Array | None:
        try:
            return centre_crop(
                decode_rgb(sample.data), self._frozen.preprocessing.image_size, self._frozen.resize_share
            )
        except DecodeError:
            return None

    def _encoded(self, batches: Iterable[_Pictures]) -> Iterator[pa.Table]:
        for batch in batches:
            if not batch.samples:
                continue
            features, _ = self._frozen.pool([batch])
            values = pa.array(features.numpy().reshape(-1))
            columns = [
                pa.array([row for row, _ in batch.samples], type=pa.int64()),
                pa.array([sample.path or None for _, sample in batch.samples], type=pa.string()),
                pa.array([sample.label if sample.label >= 0 else None for _, sample in batch.samples], type=pa.int64()),
                pa.FixedSizeListArray.from_arrays(values, self._frozen.width),
            ]
            yield pa.Table.from_arrays(columns, schema=schema_of(self._frozen.width))


def schema_of(width: int) -> pa.Schema:
    """The columns of a file."""
    kinds = {"row": pa.int64(), "path": pa.string(), "label": pa.int64(), "feature": pa.list_(pa.float32(), width)}
    return pa.schema(list(kinds.items()))


def embed(arguments: Arguments) -> int:
    """Write the files.   Returns: the process's exit status."""
    # Workers may have been started elsewhere.
    arguments = replace(arguments, weights=arguments.weights.expanduser().resolve())
    if arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}: it must be at least 1.")
    targets = choose_targets(arguments)
    # The workers' processes load their own, perhaps on GPUs that this one does not have.
    frozen = (replace(arguments, device="cpu") if arguments.workers > 1 else arguments).load()
    sources = {split: open_source(arguments.data, split) for split in targets}
    for split, target in targets.items():
        source = sources[split]
        start = time.monotonic()
        tables = (
            _on_ray(arguments, source)
            if arguments.workers > 1
            else map(Embedder(frozen, source), parts(source.num_rows, 1))
        )
        with writing(target, overwrite=arguments.overwrite) as partial:
            count = write(partial, tables, frozen, source)
        seconds = time.monotonic() - start
        broken = source.num_rows - count
        print(
            f"{target}: {count} images of {source.name}, {frozen.width} values each, {count / seconds:.0f} images/s"
            + (f"; {broken} could not be decoded and are left out" if broken else "")
        )
    return 0


def choose_targets(arguments: Arguments) -> dict[str, Path]:
    """The file of each split.   Raises: ValueError, before time is lost."""
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


def write(path: Path, tables: Iterable[pa.Table], frozen: FrozenEncoder, source: Source) -> int:
    """Write tables as they come, a row group each.   Returns: the number of rows."""
    facts: dict[str, Any] = {
        "weights": str(frozen.path),
        "encoder_digest": frozen.digest,
        "run_id": frozen.run_id,
        "preprocessing": {**asdict(frozen.preprocessing), "resize_share": frozen.resize_share},
        "width": frozen.width,
        "data": {"name": source.name, "digest": source.digest},
        "class_names": source.class_names,
    }
    schema = schema_of(frozen.width).with_metadata({"mixmae": json.dumps(facts)})
    count, start = 0, time.monotonic()
    said = start
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)
            count += len(table)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                print(
                    f"{source.name}: {count}/{source.num_rows} images, {count / (said - start):.0f} images/s",
                    flush=True,
                )
        writer.add_key_value_metadata({"mixmae.broken": str(source.num_rows - count)})  # known only now
    return count


def parts(num_rows: int, workers: int) -> list[Int64Array]:
    """The rows of each row group; of a small set, such that all workers have some."""
    size = min(PART_ROWS, -(-num_rows // workers))
    return [np.arange(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _Worker:
    """An Embedder as Ray Data wants it: built in each process of the pool, given a block of one part."""

    def __init__(self, arguments: Arguments, source: Source) -> None:
        self._embed = Embedder(arguments.load(), source, arguments.workers)

    def __call__(self, block: dict[str, Any]) -> pa.Table:
        return self._embed(np.arange(block["start"][0], block["stop"][0]))


def _on_ray(arguments: Arguments, source: Source) -> Iterator[pa.Table]:
    """The tables of all parts in their order, made by a pool of processes."""
    import ray.data

    from mixmae.training.cluster import join

    use_gpu = join(arguments.ray_address, num_workers=arguments.workers, device=arguments.device)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    cuts = [{"start": int(rows[0]), "stop": int(rows[-1]) + 1} for rows in parts(source.num_rows, arguments.workers)]
    dataset = ray.data.from_items(cuts, override_num_blocks=len(cuts)).map_batches(
        _Worker,
        fn_constructor_args=(arguments, source),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(arguments.workers, len(cuts))),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = tyro.cli(Arguments, args=argv, prog="embed.py", description=__doc__)
    try:
        return embed(arguments)
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


if __name__ == "__main__":
    # Import ourselves by name, so that what travels to the workers is this module's and not __main__'s.
    from pipelines.embed import main as _main

    sys.exit(_main())
