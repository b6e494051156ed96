"""What this machine has to compute on."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "gpu"]
"""Where to compute; auto takes GPUs if there are any."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of the container that this process is in."""


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer if its container has a quota of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_cores())))


def threads_per_process(num_processes: int) -> int:
    """Threads for each of the processes that share the usable cores."""
    return max(1, usable_cores() // num_processes)


def cache_folders() -> list[Path]:
    """Where files may be kept that can be made again, the best first; any of them may turn out not to be writable."""
    cache, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
    places = [Path(cache)] if os.path.isabs(cache) else []
    places += [Path(home) / ".cache"] if os.path.isabs(home) else []
    places.append(Path(tempfile.gettempdir()) / f"cache-{os.getuid()}")
    return [place / "mixmae" for place in places]


def _cgroup_cores() -> float:
    """The quota in cores, infinite without one."""
    try:  # version 2: "max 100000", or quota and period in microseconds
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1: -1 is no quota
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
