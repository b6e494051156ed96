"""How often a run is started again."""

from __future__ import annotations

import pytest

from mixmae.training.budget import LONGEST_WAIT_S, STORE_PATIENCE_S, FailureBudget
from mixmae.training.failures import TrainingStopped, WorkersFailed


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_failures_without_progress_use_it_up():
    budget = FailureBudget(3)
    assert [budget.spend(10, "rank 0: RuntimeError: x") for _ in range(3)] == [1.0, 2.0, 4.0]
    with pytest.raises(WorkersFailed, match="rank 0: RuntimeError: y"):
        budget.spend(10, "rank 0: RuntimeError: y")


def test_progress_renews_it():
    budget = FailureBudget(2)
    assert [budget.spend(step, "x") for step in (-1, -1, 10, 10, 20, 30, 30)] == [1, 2, 1, 2, 1, 1, 2]
    with pytest.raises(WorkersFailed):
        budget.spend(30, "x")


def test_without_restarts():
    for cause in ("x", "s3://bucket/a cannot be read (timeout): check the address, the credentials and the endpoint"):
        with pytest.raises(WorkersFailed):
            FailureBudget(0).spend(10, cause)


def test_a_store_that_is_away_is_waited_for_for_hours():
    clock = Clock()
    budget = FailureBudget(3, clock)
    cause = "rank 0: DataError: s3://b/x cannot be read (timeout): check the address, the credentials and the endpoint"
    waits = []
    while clock.now < STORE_PATIENCE_S - LONGEST_WAIT_S:
        waits.append(budget.spend(10, cause))
        clock.now += waits[-1] + 20
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-1] == LONGEST_WAIT_S
    assert len(waits) > 50
    clock.now = STORE_PATIENCE_S + 1
    with pytest.raises(WorkersFailed):
        budget.spend(10, cause)


@pytest.mark.parametrize(
    "cause",
    [
        "rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "rank 0: RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
        "OutOfMemoryError: Task was killed due to the node running low on memory",
    ],
)
def test_too_little_memory_is_a_sentence(cause):
    with pytest.raises(TrainingStopped, match=r"not enough memory.*--loop\.micro-batch-size"):
        FailureBudget(3).spend(10, cause)
