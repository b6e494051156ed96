"""Where rows lie in chunks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixmae.data.chunks import ChunkIndex, cut_chunks, group_by_chunk


def test_rows_are_found_in_their_chunks():
    index = ChunkIndex(np.array([3, 0, 2]))
    assert index.num_rows == 5
    assert index.starts.tolist() == [0, 3, 3, 5]
    chunks, within = index.locate([4, 0, 2, 3])
    assert chunks.tolist() == [2, 0, 0, 2]
    assert within.tolist() == [1, 0, 2, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(lambda sizes: sum(sizes) > 0))
def test_every_row_is_at_its_address(sizes):
    index = ChunkIndex(np.array(sizes))
    chunks, within = index.locate(np.arange(index.num_rows))
    expected = [(chunk, row) for chunk, size in enumerate(sizes) for row in range(size)]
    assert list(zip(chunks.tolist(), within.tolist(), strict=True)) == expected


def test_groups_keep_the_order_inside_a_chunk():
    groups = group_by_chunk(np.array([5, 1, 5, 0, 1]))
    assert [group.tolist() for group in groups] == [[3], [1, 4], [0, 2]]
    assert group_by_chunk(np.array([], dtype=np.int64)) == []


def test_chunks_of_a_layout_without_its_own():
    assert cut_chunks(150).tolist() == [64, 64, 22]
    assert cut_chunks(0).tolist() == []
