"""The cores that a process may use: its affinity, and its container's quota."""

import os

import pytest

from mixmae import machine

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")


@pytest.fixture
def eight_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 8), ("?", 8)]
)
def test_quota_of_the_container(eight_cores, quota, cores):
    (eight_cores / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_quota_of_the_first_version(eight_cores, quota, cores):
    (eight_cores / "cpu").mkdir()
    (eight_cores / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (eight_cores / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores() == cores


def test_without_a_quota_it_is_the_affinity(eight_cores):
    assert machine.usable_cores() == 8


@needs_affinity
def test_affinity_of_this_process():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_threads_share_the_cores(eight_cores):
    assert [machine.threads_per_process(count) for count in (1, 3, 8, 20)] == [8, 2, 1, 1]
