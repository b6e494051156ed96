"""Signals, and the loss of the folder, while work is done in a thread; needs no Ray."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mixmae.training.failures import FolderLost, Interrupted
from mixmae.training.interrupt import signals

pytestmark = pytest.mark.timeout(30)


class Mailbox:
    """Stands for the actor's handle: the call that run() makes."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.request_stop = self

    def remote(self) -> None:
        self.asked.set()


def later(seconds: float, number: int) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_work_is_asked_to_end_and_its_result_is_returned(number):
    mailbox = Mailbox()

    def work() -> str:
        assert mailbox.asked.wait(10)
        return "saved"

    with signals() as request:
        later(0.3, number)
        assert request.run(work, mailbox, {"started"}) == "saved"
        assert request.signal == number


def test_before_the_start_there_is_nothing_to_wait_for():
    with signals() as request:
        later(0.3, signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            request.run(threading.Event().wait, Mailbox(), set())  # for ever
        assert caught.value.exit_status == 143


def test_a_second_signal_does_not_wait():
    with signals() as request:
        later(0.2, signal.SIGINT)
        later(0.8, signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            request.run(threading.Event().wait, Mailbox(), {"started"})
        assert caught.value.exit_status == 130


def test_errors_of_the_work_are_raised_here_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        raise RuntimeError("of the work")

    with signals() as request, pytest.raises(RuntimeError, match="of the work"):
        request.run(work, Mailbox(), set())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_pause_ends_with_a_signal():
    with signals() as request:
        later(0.2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            request.sleep(1e9)


@pytest.mark.parametrize("waits_for", ["work", "pause"])
def test_who_has_lost_the_folder_ends_and_storage_that_is_away_says_nothing(waits_for, monkeypatch):
    monkeypatch.setattr("mixmae.training.interrupt.OWNER_LOOK_S", 0.0)
    answers = iter([OSError("away"), True, ValueError("damaged"), True, False])

    def may_write() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with signals(may_write) as request:
        wait = {
            "work": lambda: request.run(threading.Event().wait, Mailbox(), {"started"}),
            "pause": lambda: request.sleep(1e9),
        }
        with pytest.raises(FolderLost):
            wait[waits_for]()
    assert next(answers, None) is None
