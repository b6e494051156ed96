"""The properties of the order, by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.data.order import Plan, hash64, permutation, uniforms, worker_positions
from mixmae.share import WorkerShare
from mixmae.training.schedule import run_length

GOLDEN_WORDS = [241634772696565473, 8714790858771135257]
GOLDEN_PERMUTATION = [7, 3, 2, 0, 5, 6, 1, 4]
GOLDEN_ROWS = [5, 7, 0, 6, 1, 8, 3, 4, 2, 5, 4, 3, 6, 1, 2, 0, 8, 7]

# The time of an example says nothing on a shared machine.
settings.register_profile("order", deadline=None, max_examples=60)
settings.load_profile("order")

chunk_lists = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) > 0)
plans = st.builds(
    lambda sizes, seed, window: Plan(chunk_sizes=np.array(sizes), seed=seed, window_rows=window),
    chunk_lists,
    st.integers(0, 2**62),
    st.integers(1, 200),
)


def shares_of(batch_size: int, num_workers: int) -> list[WorkerShare]:
    return [WorkerShare(batch_size=batch_size, rank=rank, num_workers=num_workers) for rank in range(num_workers)]


@given(plans, st.integers(0, 3))
def test_every_row_comes_exactly_once_an_epoch(plan, epoch):
    n = plan.num_rows
    rows, epochs = plan.rows_at(epoch * n, (epoch + 1) * n)
    assert np.array_equal(np.sort(rows), np.arange(n))
    assert (epochs == epoch).all()


@given(plans, st.integers(8, 40), st.integers(0, 12))
def test_workers_share_the_same_global_batch(plan, global_batch, step):
    expected, _ = plan.rows_at(step * global_batch, (step + 1) * global_batch)
    for num_workers in range(1, 9):
        shares = shares_of(global_batch, num_workers)
        parts = [plan.rows_of(worker_positions(step * own.images, (step + 1) * own.images, own))[0] for own in shares]
        assert np.array_equal(np.concatenate(parts), expected)


@given(plans, st.integers(0, 200), st.integers(0, 200))
def test_any_part_of_the_run_is_the_same_as_in_the_whole(plan, start, length):
    whole, epochs = plan.rows_at(0, start + length)
    part, part_epochs = plan.rows_at(start, start + length)
    assert np.array_equal(part, whole[start:])
    assert np.array_equal(part_epochs, epochs[start:])


@given(plans, st.lists(st.integers(0, 500), max_size=40))
def test_positions_may_come_in_any_order(plan, positions):
    whole, _ = plan.rows_at(0, 501)
    assert np.array_equal(plan.rows_of(np.array(positions, dtype=np.int64))[0], whole[positions])


def test_epochs_and_seeds_differ():
    sizes = np.full(20, 10)
    first, second = Plan(chunk_sizes=sizes, seed=1), Plan(chunk_sizes=sizes, seed=2)
    epoch_0, epoch_1 = first.rows_at(0, 200)[0], first.rows_at(200, 400)[0]
    assert (epoch_0 != epoch_1).mean() > 0.9
    assert (epoch_0 != second.rows_at(0, 200)[0]).mean() > 0.9


def test_no_window_is_short_and_rows_of_a_window_come_from_its_chunks():
    plan = Plan(chunk_sizes=np.full(100, 16), seed=3, window_rows=160)
    rows, _ = plan.rows_at(0, 1600)
    for start in range(0, 1600, 160):
        window = rows[start : start + 160]
        assert len(np.unique(window // 16)) == 10
        assert not np.array_equal(window, np.sort(window))


@given(plans, st.integers(5, 40), st.integers(0, 10), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_a_run_resumed_by_other_workers_sees_the_very_next_images(plan, global_batch, crash, more, before, after):

    def steps(start: int, stop: int, num_workers: int) -> np.ndarray:
        parts = [
            plan.rows_of(worker_positions(start * own.images, stop * own.images, own))[0].reshape(-1, own.images)
            for own in shares_of(global_batch, num_workers)
        ]
        return np.concatenate(parts, axis=1).ravel()

    seen = np.concatenate([steps(0, crash, before), steps(crash, crash + more, after)])
    assert np.array_equal(seen, plan.rows_at(0, (crash + more) * global_batch)[0])


def test_how_well_a_class_sorted_set_is_mixed():
    """128,000 rows sorted by 1000 classes, in chunks of 64. A uniform shuffle repeats a neighbour's class in 0.1 % of
    places; runs of one class are at most 2 or 3 long."""
    for window_rows, most_repeats, longest in [(1024, 0.07, 8), (16_384, 0.006, 4)]:
        plan = Plan(chunk_sizes=np.full(2000, 64), seed=0, window_rows=window_rows)
        rows, _ = plan.rows_at(0, plan.num_rows)
        # Chunks are permuted uniformly, so the correlation is that of 2000 random numbers.
        assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 3 / np.sqrt(2000)
        classes = rows * 1000 // plan.num_rows
        assert (classes[1:] == classes[:-1]).mean() < most_repeats
        ends = np.flatnonzero(np.append(np.diff(classes), 1))
        assert np.diff(np.append(-1, ends)).max() <= longest


def test_a_billion_rows_cost_no_more_than_their_chunks():
    plan = Plan(chunk_sizes=np.full(100_000, 10_000), seed=0, window_rows=20_000)
    rows, epochs = plan.rows_at(3 * 10**9 - 5, 3 * 10**9 + 5)
    assert list(epochs) == [2] * 5 + [3] * 5
    assert len(np.unique(rows)) == 10


def test_the_numbers_never_change():
    """The hash is part of the format of a run: a change here makes every resumed run see other images."""
    assert [int(word) for word in hash64(1, 2, np.arange(2))] == GOLDEN_WORDS
    assert list(permutation(8, 5)) == GOLDEN_PERMUTATION
    rows, _ = Plan(chunk_sizes=np.array([3, 4, 2]), seed=7, window_rows=4).rows_at(0, 18)
    assert list(rows) == GOLDEN_ROWS


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(4, 1, np.arange(20_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(draws.mean(axis=0), 0.5, atol=0.01)
    assert np.allclose(np.corrcoef(draws.T), np.eye(4), atol=0.03)
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


@settings(max_examples=30)
@given(plans, st.integers(1, 64), st.integers(1, 5))
def test_the_tail_is_shorter_than_a_batch(plan, batch, epochs):
    """What a run of so many epochs trains on: all rows of the earlier epochs, of the last all but less than a batch."""
    batch = min(batch, plan.num_rows)
    length = run_length(num_images=plan.num_rows, batch_size=batch, epochs=epochs, warmup_epochs=0)
    rows, epoch = plan.rows_at(0, length.total_steps * batch)
    assert 0 <= epochs * plan.num_rows - len(rows) < batch
    for whole in range(epochs - 1):
        assert sorted(rows[epoch == whole]) == list(range(plan.num_rows))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk_sizes": np.array([], dtype=np.int64)}, "empty"),
        ({"chunk_sizes": np.array([0, 0])}, "empty"),
        ({"chunk_sizes": np.array([3]), "window_rows": 0}, "window_rows is 0"),
    ],
)
def test_bad_plans(arguments, words):
    with pytest.raises(ValueError, match=words):
        Plan(**arguments)
