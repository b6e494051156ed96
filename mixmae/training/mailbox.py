"""Messages from rank 0 of the workers to the driver, whatever node each is on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

Message = tuple[str, Any]
"""(kind, content): ("progress", dict), ("broken", list of dict), ("panel", (step, PNG bytes)), ("evaluation", dict),
("left_out", list of dict: broken images of the evaluations), ("note", one line), ("saved", step), ("started", step that
training starts from), ("failed", one line; the worker group restarts if it may)."""


@ray.remote
class Mailbox:
    """An actor that keeps messages until the driver takes them; it survives restarts of the worker group."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        """Add a message; those of one caller stay in order."""
        self._messages.put(message)

    def take(self) -> list[Message]:
        """All messages since the last call."""
        return [self._messages.get() for _ in range(self._messages.qsize())]


def open_mailbox() -> Any:
    """Start a mailbox; returns its actor handle, which may be pickled."""
    return Mailbox.options(num_cpus=0).remote()  # type: ignore[attr-defined]


@contextlib.contextmanager
def reading(mailbox: Any, on_message: Callable[[Message], None], interval_s: float = 0.5) -> Iterator[None]:
    """Hand the mailbox's messages to `on_message` from a thread while the context is open, the last ones at its end."""
    done = threading.Event()

    def read() -> None:
        last = False
        while not last:
            last = done.wait(interval_s)
            try:
                messages = ray.get(mailbox.take.remote(), timeout=30)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                continue
            for message in messages:
                on_message(message)

    thread = threading.Thread(target=read, name="messages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=60)
