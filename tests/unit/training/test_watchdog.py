"""A process that stands still is ended, with the places of its threads."""

from __future__ import annotations

import threading
import time

import pytest

from mixmae.training.watchdog import Watchdog

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def ended():
    return threading.Event()


def watchdog(tmp_path, ended, said) -> Watchdog:
    return Watchdog(tmp_path / "stacks.txt", said.append, least_s=0.4, end=lambda status: ended.set())


def test_silence_ends_it(tmp_path, ended):
    said: list[str] = []
    watchdog(tmp_path, ended, said)
    assert ended.wait(10)
    assert "no batch and no step for" in said[0]
    assert "test_silence_ends_it" in (tmp_path / "stacks.txt").read_text()  # where this thread stands


def test_signs_of_life_and_pauses_do_not(tmp_path, ended):
    dog = watchdog(tmp_path, ended, [])
    for _ in range(15):
        dog.beat()
        time.sleep(0.05)
    with dog.paused():
        assert not ended.wait(1.0)
    assert not ended.is_set()
    assert ended.wait(10)


def test_a_closed_one_is_silent(tmp_path, ended):
    watchdog(tmp_path, ended, []).close()
    assert not ended.wait(1.5)


def test_usual_times_are_taken_into_account(tmp_path, ended):
    dog = watchdog(tmp_path, ended, [])
    for _ in range(6):  # 0.2 s between two signs: 4 s are allowed
        time.sleep(0.2)
        dog.beat()
    assert not ended.wait(1.5)
