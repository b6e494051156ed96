"""How a global batch is cut, and which cuts are refused."""

from __future__ import annotations

import pytest

from mixmae.share import WorkerShare


def test_a_batch_is_cut_into_shares_and_micro_batches():
    share = WorkerShare(batch_size=24, micro_batch_size=4, rank=1, num_workers=3)
    assert (share.images, share.micro_batch, share.accumulation) == (8, 4, 2)
    assert [share.first_sample(index) for index in range(2)] == [8, 12]


def test_without_a_micro_batch_the_share_goes_through_at_once():
    share = WorkerShare(batch_size=24, rank=2, num_workers=3)
    assert (share.micro_batch, share.accumulation, share.first_sample(0)) == (8, 1, 16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 10, "micro_batch_size": 4}, "not a multiple of the micro-batch of 4"),
        ({"batch_size": 8, "micro_batch_size": 0}, "micro-batch of 0"),
        ({"batch_size": 10, "num_workers": 4}, "cannot be shared equally by 4 workers"),
        ({"batch_size": 0}, "A batch of 0 images"),
        ({"batch_size": 8, "rank": 2, "num_workers": 2}, "rank 2 of 2"),
    ],
)
def test_cuts_that_do_not_work_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        WorkerShare(**fields)
