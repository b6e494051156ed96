"""How often, and after which pause, a run is started again after a failure."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from mixmae.training.failures import TrainingStopped, WorkersFailed

LONGEST_WAIT_S = 300.0
STORE_PATIENCE_S = 6 * 3600.0
"""A store or a network that is away comes back, after hours perhaps; nobody has to watch for it."""

_STORE = re.compile(r"check the address, the credentials and the endpoint|StoreError", re.IGNORECASE)
_MEMORY = re.compile(
    r"OutOfMemory|CUDA out of memory|MemoryError|DefaultCPUAllocator: can't allocate|Cannot allocate memory",
    re.IGNORECASE,
)


@dataclass
class FailureBudget:
    """Counts failures between two checkpoints: progress renews the budget.

    Args: max_failures: restarts without a new checkpoint between them.  clock: of seconds, for tests.
    """

    max_failures: int
    clock: Callable[[], float] = time.monotonic
    _step: int = -1
    _count: int = 0
    _since: float | None = None

    def spend(self, step: int, cause: str) -> float:
        """Take note of a failure.

        Args:    step: of the newest checkpoint.  cause: in one line.
        Returns: seconds to wait before the next start.
        Raises:  TrainingStopped where memory does not suffice; WorkersFailed when the budget is used up.
        """
        if _MEMORY.search(cause):
            raise TrainingStopped(
                f"There is not enough memory ({cause}): lower --loop.micro-batch-size, use fewer --workers per machine "
                "or take a smaller recipe; the same command then continues from the last checkpoint."
            )
        if step > self._step:
            self._step, self._count, self._since = step, 0, None
        self._count += 1
        self._since = self.clock() if self._since is None else self._since
        wait = min(LONGEST_WAIT_S, 2.0 ** (self._count - 1))
        if _STORE.search(cause) and self.max_failures > 0:
            if self.clock() - self._since < STORE_PATIENCE_S:
                return wait
        elif self._count <= self.max_failures:
            return wait
        raise WorkersFailed(cause)
