"""What a stream refuses, and how it cuts a run into blocks; no Ray cluster is started."""

from __future__ import annotations

import itertools
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mixmae.data.blocks import Block, BrokenRecord, load_block, local_batches
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.order import Plan, worker_positions
from mixmae.data.sources import open_source
from mixmae.data.stream_config import StreamConfig
from mixmae.data.streams import DECODE_NICE, TrainStream, _block_edges, _pack, _pool, _unpack
from mixmae.share import WorkerShare


def test_bad_arguments(write_shards):
    with pytest.raises(ValueError, match="made for another source"):
        TrainStream(
            open_source(write_shards(5)),
            Plan(chunk_sizes=np.array([3])),
            AugmentConfig(),
            share=WorkerShare(batch_size=1),
            stop_step=1,
        )
    with pytest.raises(ValueError, match="prefetch_blocks is 0"):
        StreamConfig(prefetch_blocks=0)


@given(
    *(st.integers(0, 5), st.integers(0, 5), st.integers(1, 60), st.integers(1, 3), st.integers(1, 40)),
    *(st.integers(1, 4), st.integers(0, 3), st.integers(1, 60)),
)
def test_blocks_are_whole_steps_or_micro_batches_or_parts_of_one(
    first, count, blocks, block, micro, num_workers, rank, target
):
    assume(rank < num_workers <= blocks)
    share = WorkerShare(
        batch_size=blocks * block, block=block, micro_batch_size=micro * block, rank=rank, num_workers=num_workers
    )
    edges = _block_edges(first, first + count, share, target)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (first * share.images, (first + count) * share.images)
    assert (sizes > 0).all()
    assert (sizes <= target).all()
    ends = {step * share.images + edge for step in range(first, first + count) for edge in share.edges}
    for start, stop in itertools.pairwise(edges.tolist()):
        inside = [edge for edge in ends if start < edge < stop]
        assert {start, stop} <= ends if inside else True  # a block of several micro-batches has whole ones


def test_a_block_comes_through_the_object_store_as_it_was():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    block = Block(images, np.array([7, 9]), np.array([-1, 2]), np.array([0, 1]), {1: BrokenRecord(9, "a", "empty")})
    index, copy = _unpack(_pack(3, block))
    assert index == 3
    assert copy.broken == block.broken
    for name in ("images", "rows", "labels", "epochs"):
        assert np.array_equal(getattr(copy, name), getattr(block, name))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's threads have priorities of their own")
def test_training_goes_before_decoding():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    pool = _pool.__wrapped__(1)  # not the one that is kept
    assert pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == min(19, before + DECODE_NICE)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize("target", [1, 3, 5, 8, 100])
def test_blocks_become_micro_batches_whatever_their_sizes(write_shards, target):
    """Of workers with unequal shares: the batches of the plain loop, from blocks of any size."""
    source = open_source(write_shards(30, 10))
    plan, augment = Plan(chunk_sizes=source.chunk_sizes), AugmentConfig(image_size=16)

    class WithoutRay(TrainStream):
        def __init__(self, share):
            self._share, self._edges = share, _block_edges(1, 4, share, target)

        def _blocks(self):
            for start, stop in itertools.pairwise(self._edges.tolist()):
                yield load_block(source, augment, *plan.rows_of(worker_positions(start, stop, self._share)), seed=0)

        def close(self):
            pass

    for rank in range(3):
        share = WorkerShare(batch_size=22, block=2, micro_batch_size=4, rank=rank, num_workers=3)
        streamed = list(WithoutRay(share))
        expected = list(local_batches(source, plan, augment, share=share, start_step=1, stop_step=4))
        assert [len(batch.rows) for batch in streamed] == 3 * list(share.micro_batches)
        assert [batch.rows.tolist() for batch in streamed] == [batch.rows.tolist() for batch in expected]
        assert all(torch.equal(one.images, other.images) for one, other in zip(streamed, expected, strict=True))
