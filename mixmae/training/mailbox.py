"""Messages from rank 0 of the workers to the driver, whatever node each is on.

They are for people who watch, and best effort: no lost message, dead actor or full disk ends or stalls training.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Message = tuple[str, Any]
"""(kind, content): ("progress", dict), ("broken", list of dict), ("evaluation", dict), ("left_out", list of dict:
broken images of the evaluations), ("note", one line), ("saved", step), ("started", step that training starts from),
("failed", one line), and from the driver ("restart", one line: a new worker group is started) and ("workers", dict:
the `count` of those that are started, `of` what --workers allows)."""


@ray.remote
class Mailbox:
    """An actor that keeps messages until the driver takes them; it survives restarts of the worker group."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._is_stopping = False

    def put(self, message: Message) -> None:
        """Add a message; those of one caller stay in order."""
        self._messages.put(message)

    def request_stop(self) -> None:
        """Ask the workers to save and to end."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Whether they were asked to."""
        return self._is_stopping

    def take(self) -> list[Message]:
        """All messages since the last call."""
        return [self._messages.get() for _ in range(self._messages.qsize())]


def open_mailbox() -> Any:
    """Start a mailbox; returns its actor handle, which may be pickled.

    It is on the driver's node, as one that dies with another node would be missed; dead, it is started again, empty.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return Mailbox.options(**options).remote()  # type: ignore[attr-defined]


def deliver(mailbox: Any, message: Message, timeout_s: float = 10) -> None:
    """Put a message in and wait until it is there, but not for long, and not if there is no mailbox any more."""
    with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        ray.get(mailbox.put.remote(message), timeout=timeout_s)


@contextlib.contextmanager
def reading(mailbox: Any, on_message: Callable[[Message], None], interval_s: float = 0.5) -> Iterator[set[str]]:
    """Hand the mailbox's messages to `on_message` from a thread while the context is open, the last ones at its end.

    What `on_message` cannot do, such as write to a full disk, is printed once per kind of error; the messages go on.

    Yields: the kinds of the messages that have come.
    """
    done = threading.Event()
    heard: set[str] = set()
    told: set[type[Exception]] = set()

    def read() -> None:
        last = False
        while not last:
            last = done.wait(interval_s)
            try:
                messages = ray.get(mailbox.take.remote(), timeout=30)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                continue
            for message in messages:
                heard.add(message[0])
                try:
                    on_message(message)
                except Exception as error:
                    if type(error) not in told:
                        told.add(type(error))
                        print(f"note: a message of the workers, {message[0]!r}, was lost: {error}", flush=True)

    thread = threading.Thread(target=read, name="messages", daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        done.set()
        thread.join(timeout=60)
