"""Training batches through Ray Data: it executes the plan of order.py and decides nothing itself.

Each worker process runs its own pipeline over its own share of the run: a list of block descriptors (which rows, of
which epochs) goes through ONE map operator that returns a finished uint8 block for each. Order is Ray Data's
preserve_order, checked again here by the descriptor's number.

Three choices keep it from standing still on few CPUs:
- A task returns exactly one output, one table of one row, so it never waits, holding its CPU, for someone to read.
- Tasks ask for a fraction of a CPU and their number is bounded, so the pipelines of several workers fit side by side.
- The run is cut into segments, each an execution of its own; the next one starts before the current one runs dry.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from mixmae.data.blocks import Block, BrokenRecord, ImageBatch, as_batch, load_block
from mixmae.data.images.augment import BaseAugmentConfig, JointAugmentConfig
from mixmae.data.order import Plan, worker_positions
from mixmae.data.source import DataError, Source
from mixmae.data.stream_config import StreamConfig
from mixmae.data.trial import TriedSource
from mixmae.machine import keep_freed_memory
from mixmae.share import WorkerShare

DECODE_NICE = 5
"""How much lower the priority of threads that decode is; on Linux each thread has its own. Training then gets three
times their share of a core; at 19 it is 70 times, and beside busy programs images would hardly come at all."""
_MOST_STARTS = 5
"""Of one decoding task. A node that goes away ends it, too, but hardly so often."""


class TrainStream:
    """One worker's micro-batches from start_step to stop_step, decoded by Ray tasks all over the cluster.

    Iterate once, and close (or leave a `contextlib.closing`) to stop the tasks. Nothing before start_step is decoded.

    Args:
        source, plan, augment: what is seen, when, and how it is cropped; the plan is of this source.
        share: which images of each global batch are this worker's, and how many are in one ImageBatch.
        start_step, stop_step: steps of the run, the last exclusive.
        channels: of the images: 1 grey, 3 RGB, 4 RGBA.
        config: how it is executed.
    Raises: ValueError if the plan is of another source.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        augment: BaseAugmentConfig,
        *,
        share: WorkerShare,
        start_step: int = 0,
        stop_step: int,
        channels: int = 3,
        config: StreamConfig | None = None,
    ) -> None:
        if not np.array_equal(plan.chunk_sizes, source.chunk_sizes):
            raise ValueError("the plan was made for another source: build it from this source's chunk_sizes")
        self._plan = plan
        self._share = share
        self._config = config or StreamConfig()
        # The worker's images are numbered from step 0; a block is a range of these numbers.
        store_bytes = min(1e15, ray.cluster_resources().get("object_store_memory", math.inf) / share.num_workers)
        target_bytes = augment.nothing.nbytes if isinstance(augment, JointAugmentConfig) else 0
        image_bytes = channels * augment.size[0] * augment.size[1] + target_bytes
        target = _block_images(self._config, image_bytes, store_bytes)
        self._edges = _block_edges(start_step, stop_step, share, target)
        self._concurrency, self._task_cpus, threads = _task_shape(self._config, share.num_workers)
        self._load = _loader(source, augment, plan.seed, channels, threads)
        block_bytes = int(np.diff(self._edges).max(initial=1)) * (image_bytes + 24) + 4096
        self._prefetch, budget = _store_shares(self._config, block_bytes, self._concurrency, store_bytes)
        self._context = _data_context(block_bytes, budget)
        # Started here and not with the first batch: its processes start while the caller does other things.
        first = min(self._config.segment_blocks, len(self._edges) - 1)
        self._segments = [self._start_segment(0, first)] if first else []
        self._closed = False

    def __iter__(self) -> Iterator[ImageBatch]:
        waiting: list[Block] = []
        sizes = itertools.cycle(self._share.micro_batches)
        size = next(sizes)
        try:
            for block in self._blocks():
                waiting.append(block)
                count = sum(len(held.rows) for held in waiting)
                if count < size:
                    continue  # a micro-batch larger than a block comes in parts
                whole = Block.join(waiting)
                waiting = []
                start = 0
                while start < count:
                    yield _as_read_only_batch(whole.part(start, start + size))
                    start, size = start + size, next(sizes)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the tasks and drop what is decoded ahead. Safe to call twice."""
        self._closed = True
        while self._segments:
            self._segments.pop().close()

    def __del__(self) -> None:
        if getattr(self, "_segments", None):
            self.close()

    def _blocks(self) -> Iterator[Block]:
        num_blocks = len(self._edges) - 1
        size = self._config.segment_blocks
        # Starting an execution takes about a second; half a segment or 64 blocks of lead cover it.
        lead = max(1, min(64, size // 2))
        started = min(size, num_blocks)
        for index in range(num_blocks):
            while started < num_blocks and index >= started - lead and not self._closed:
                stop = min(started + size, num_blocks)
                self._segments.append(self._start_segment(started, stop))
                started = stop
            if self._closed:
                return
            segment = self._segments[0]
            number, block = segment.take()
            if number != index:
                raise RuntimeError(f"Ray Data delivered block {number} where block {index} was due: order was not kept")
            if index + 1 == segment.stop:
                self._segments.pop(0).close()
            yield block

    def _start_segment(self, start: int, stop: int) -> _Segment:
        descriptors = []
        for index in range(start, stop):
            positions = worker_positions(int(self._edges[index]), int(self._edges[index + 1]), self._share)
            rows, epochs = self._plan.rows_of(positions)
            descriptors.append({"index": index, "rows": rows.tobytes(), "epochs": epochs.tobytes()})
        with DataContext.current(self._context):
            # As many blocks as descriptors: one task each.
            dataset = ray.data.from_items(descriptors, override_num_blocks=len(descriptors)).map_batches(
                self._load,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self._task_cpus,
                compute=ray.data.TaskPoolStrategy(size=self._concurrency),
            )
        return _Segment(dataset, stop, self._prefetch)


class _Segment:
    """One execution, drained by a thread into a short queue so that blocks are ready when the loop asks for them."""

    def __init__(self, dataset: ray.data.Dataset, stop: int, prefetch_blocks: int) -> None:
        self.stop = stop
        self._queue: queue.Queue[pa.Table | BaseException] = queue.Queue(prefetch_blocks)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._drain, args=(dataset,), name="blocks", daemon=True)
        self._thread.start()

    def take(self) -> tuple[int, Block]:
        """The next block with its number.   Raises: what the execution raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return _unpack(item)

    def close(self) -> None:
        self._stopped.set()
        while True:  # make room for a thread that waits to put
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(timeout=10)

    def _drain(self, dataset: ray.data.Dataset) -> None:
        try:
            # Dropping this iterator shuts the execution down.
            for bundle in dataset.iter_internal_ref_bundles():
                for reference in bundle.block_refs:
                    self._put(ray.get(reference))
                if self._stopped.is_set():
                    return
            self._put(RuntimeError("the execution of Ray Data ended before all its blocks had come"))
        except BaseException as error:  # handed to the loop, which raises it
            self._put(error)

    def _put(self, item: pa.Table | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.5)
            except queue.Full:
                continue


def _block_images(config: StreamConfig, image_bytes: int, store_bytes: float) -> int:
    """Images per block: those of the config, or fewer if a dozen blocks would not fit in the object store."""
    most_bytes = min(config.target_block_mb * 1e6, store_bytes / 12)
    return max(1, min(config.target_block_images, int(most_bytes / image_bytes)))


def _block_edges(start_step: int, stop_step: int, share: WorkerShare, target: int) -> NDArray[np.int64]:
    """Where blocks begin among the images of a worker, counted from step 0: whole steps, whole micro-batches of one
    step, or equal parts of a micro-batch.

    Args: target: images per block, at most.
    """
    start, stop = start_step * share.images, stop_step * share.images
    if start == stop:
        return np.array([start], dtype=np.int64)
    if share.images <= target:
        edges = np.arange(start, stop, target // share.images * share.images)
    else:
        inside = [0]
        for first, last in itertools.pairwise(share.edges):
            if last - inside[-1] > target and first > inside[-1]:
                inside.append(first)
            if last - first > target:
                parts = math.ceil((last - first) / target)
                inside += [first + part * (last - first) // parts for part in range(1, parts)]
                inside.append(last)
        edges = (np.arange(start, stop, share.images)[:, None] + np.setdiff1d(inside, [share.images])).ravel()
    return np.append(edges, stop).astype(np.int64)


def _loader(
    source: Source, augment: BaseAugmentConfig, seed: int, channels: int, threads: int
) -> Callable[[pa.Table], pa.Table]:
    """The one map operator: a descriptor in, a finished block out."""

    def load(descriptor: pa.Table) -> pa.Table:
        torch.set_num_threads(1)  # the tasks and threads side by side are the parallelism
        keep_freed_memory()
        rows, epochs = (np.frombuffer(descriptor[name][0].as_py(), dtype=np.int64) for name in ("rows", "epochs"))
        with _careful_where_others_died(source, rows, channels) as images:
            work = partial(load_block, images, augment, rows, epochs, seed=seed, channels=channels)
            pool = _pool(threads)
            block = work(pool=pool) if threads > 1 else pool.submit(work).result()
        return _pack(descriptor["index"][0].as_py(), block)

    return load


@contextlib.contextmanager
def _careful_where_others_died(source: Source, rows: NDArray[np.int64], channels: int) -> Iterator[Source]:
    """The source for a decoding task: where the process of an earlier start of the same task has died, of its memory or
    of an image, each image is tried first.

    Raises: DataError if that does not help.
    """
    worker: Any = ray._private.worker.global_worker
    starts = worker.core_worker.get_current_task_attempt_number()
    if starts == 0:
        yield source
        return
    if starts >= _MOST_STARTS:
        raise DataError(
            f"the process that decodes {len(rows)} images, from {source.where(int(rows[0]))} to "
            f"{source.where(int(rows[-1]))}, has ended {starts} times, and no single image was found to end it: see "
            "whether memory suffices, and repair the images or leave them out."
        )
    with contextlib.closing(TriedSource(source, channels)) as tried:
        yield tried


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """The threads of a task's process; they outlive the task. Training goes first where it is on the same cores."""
    return ThreadPoolExecutor(threads, "decode", initializer=os.nice, initargs=(DECODE_NICE,))


def _pack(index: int, block: Block) -> pa.Table:
    """A block as a table of one row, which Ray Data can neither split nor convert."""
    columns = {name: _binary(getattr(block, name)) for name in ("images", "rows", "labels", "epochs")}
    broken = json.dumps([[position, asdict(record)] for position, record in block.broken.items()])
    shape = pa.array([list(block.images.shape)], type=pa.list_(pa.int64()))
    # One value, however long the targets are: Ray Data has trouble with columns of lists that differ in length.
    ends = np.cumsum([len(target) for target in block.targets], dtype=np.int64)
    columns["targets"] = _binary(np.concatenate(block.targets) if block.targets else np.empty(0, dtype=np.uint8))
    columns["target_ends"] = _binary(ends)
    return pa.table({"index": pa.array([index], type=pa.int64()), "shape": shape, "broken": [broken], **columns})


def _binary(array: NDArray[Any]) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, array.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(np.ascontiguousarray(array))])


def _unpack(table: pa.Table) -> tuple[int, Block]:
    """The block and its number; the arrays are views into the object store."""

    def view(name: str, kind: type) -> NDArray[Any]:
        return np.frombuffer(table[name][0].as_buffer(), dtype=kind)

    broken = {position: BrokenRecord(**record) for position, record in json.loads(table["broken"][0].as_py())}
    images = view("images", np.uint8).reshape(table["shape"][0].as_py())
    targets = np.split(view("targets", np.uint8), view("target_ends", np.int64))[:-1]
    rows, labels, epochs = (view(name, np.int64) for name in ("rows", "labels", "epochs"))
    block = Block(images, rows, labels, epochs, broken, tuple(targets))
    return table["index"][0].as_py(), block


def _as_read_only_batch(block: Block) -> ImageBatch:
    with warnings.catch_warnings():
        # torch has no read-only tensors; ImageBatch documents that its images must not be written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return as_batch(block)


def _task_shape(config: StreamConfig, num_workers: int) -> tuple[int, float, int]:
    """Decode tasks at once for one worker, the CPUs that each of them books, and its threads.

    Each worker counts as one CPU; the tasks of all workers together book the CPUs that remain. With more, one worker's
    tasks would wait for another's, and Ray would start more processes than there are cores.
    """
    total = ray.cluster_resources().get("CPU", 1)
    free = total - num_workers
    concurrency = config.decode_concurrency or max(1, int(free // num_workers))
    cpus = config.decode_cpus or min(1.0, max(0.1, free / (num_workers * concurrency)))
    threads = config.decode_threads or max(1, round(total / (num_workers * concurrency)))
    return concurrency, math.floor(cpus * 100) / 100, threads


def _store_shares(config: StreamConfig, block_bytes: int, concurrency: int, store_bytes: float) -> tuple[int, int]:
    """Blocks that wait in the worker, and bytes in the object store for the execution behind them.

    These two, and the blocks that the worker's thread and loop hold, fit into the worker's part of the store: Ray would
    spill the rest to disk. If the part is small, less is decoded ahead.
    """
    room = int(0.8 * store_bytes // block_bytes)
    prefetch = max(1, min(config.prefetch_blocks, room // 3))
    wanted = int((config.object_store_mb or 0) * 1e6) or (2 * concurrency + prefetch + 2) * block_bytes
    return prefetch, min(wanted, max(2, room - prefetch - 2) * block_bytes)


def _data_context(block_bytes: int, budget: int) -> DataContext:
    """Ray Data's settings for this stream; other users of Ray Data in the process keep theirs."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = block_bytes  # Ray Data's estimate of what a task puts into the store
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=budget)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _RestWhileIdle]
    return context


class _RestWhileIdle(ExecutionCallback):
    """Keeps Ray Data's scheduling loop from spinning while all blocks are made and wait for the training loop.

    Without it (ray 2.60) the loop takes a whole core, and in a training process the GIL with it: a demo run that never
    waited for data ran at 0.4 times the speed.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        operators = executor._topology or {}
        if not any(operator.num_active_tasks() for operator in operators):
            time.sleep(0.02)  # with tasks under way the loop waits for them, up to 0.1 s
