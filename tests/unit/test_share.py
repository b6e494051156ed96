"""How a global batch is cut into workers' shares and micro-batches."""

from __future__ import annotations

import itertools

import pytest

from mixmae.share import WorkerRange, WorkerShare


def test_a_batch_is_cut_into_shares_and_micro_batches():
    share = WorkerShare(batch_size=24, micro_batch_size=4, rank=1, num_workers=3)
    assert (share.first, share.images, share.micro_batches, share.accumulation) == (8, 8, (4, 4), 2)
    assert [share.first_sample(index) for index in range(2)] == [8, 12]


def test_without_a_micro_batch_the_share_goes_through_at_once():
    share = WorkerShare(batch_size=24, rank=2, num_workers=3)
    assert (share.micro_batches, share.accumulation, share.first_sample(0)) == ((8,), 1, 16)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("micro_blocks", [None, 1, 2, 3, 5, 40])
@pytest.mark.parametrize("num_blocks", [12, 13, 8])
def test_any_number_of_workers_shares_every_image_once_and_in_order(block, micro_blocks, num_blocks):
    batch_size = num_blocks * block
    for num_workers in range(1, 9):
        shares = [
            WorkerShare(
                batch_size=batch_size,
                block=block,
                micro_batch_size=micro_blocks and micro_blocks * block,
                rank=rank,
                num_workers=num_workers,
            )
            for rank in range(num_workers)
        ]
        seen = [
            sample
            for share in shares
            for index, size in enumerate(share.micro_batches)
            for sample in range(share.first_sample(index), share.first_sample(index) + size)
        ]
        assert seen == list(range(batch_size))
        sizes = [share.images for share in shares]
        assert max(sizes) - min(sizes) in (0, block)
        assert all(share.images == sum(share.micro_batches) for share in shares)
        for share in shares:
            assert all(size % block == 0 and size > 0 for size in share.micro_batches)
            assert max(share.micro_batches) - min(share.micro_batches) in (0, block)
            assert micro_blocks is None or max(share.micro_batches) <= micro_blocks * block
        # Loss / divisor, summed over micro-batches and averaged over workers, is the mean over the batch.
        weights = [
            [(size, 1 / share.divisor(index) / num_workers) for index, size in enumerate(share.micro_batches)]
            for share in shares
        ]
        assert sum(weight for _, weight in itertools.chain(*weights)) == pytest.approx(1, abs=1e-12)
        assert all(weight / size == pytest.approx(1 / batch_size) for size, weight in itertools.chain(*weights))


def test_where_all_shares_are_alike_the_divisor_is_the_number_of_micro_batches_to_the_bit():
    for num_workers, micro_batch_size in itertools.product((1, 2, 3, 4, 6), (1, 2, None)):
        share = WorkerShare(batch_size=24, micro_batch_size=micro_batch_size, num_workers=num_workers)
        assert {share.divisor(index) for index in range(share.accumulation)} == {float(share.accumulation)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 0}, "micro-batch of 0"),
        ({"batch_size": 8, "block": 4, "micro_batch_size": 6}, "multiple of 4"),
        ({"batch_size": 10, "block": 4}, "10 images cannot be cut into parts of 4.*--loop.batch-size a multiple of 4"),
        ({"batch_size": 10, "block": 4, "micro_batch_size": 4}, "or change --loop.micro-batch-size"),
        ({"batch_size": 0}, "batch of 0 images"),
        ({"batch_size": 3, "num_workers": 4}, r"3 images cannot be shared by 4 workers: lower --workers to 3 or less"),
        ({"batch_size": 8, "block": 4, "num_workers": 3}, "2 times 4 that stay together, cannot be shared by 3"),
        ({"batch_size": 8, "rank": 2, "num_workers": 2}, "rank 2 of 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WorkerShare(**fields)


def test_numbers_of_workers():
    assert WorkerRange.parse("2:8") == WorkerRange(2, 8)
    assert WorkerRange.parse(3) == WorkerRange.parse("3") == WorkerRange.parse("3:3") == WorkerRange(3, 3)
    assert [str(WorkerRange(*pair)) for pair in ((2, 8), (3, 3))] == ["2:8", "3"]
    assert [WorkerRange(*pair).is_elastic for pair in ((2, 8), (3, 3))] == [True, False]


@pytest.mark.parametrize("text", ["8:2", "0:4", "0", "-2", "a:b", "2:", ":2", "1:2:3", "", "2.5"])
def test_numbers_that_cannot_be(text):
    with pytest.raises(ValueError, match=r"^--workers is .*: .*\.$"):
        WorkerRange.parse(text)
