"""What this machine has to compute on, and where files may lie on it that are nobody's results."""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # what a command needs first, such as its --help, does not wait for torch
    import torch
    from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
Device = Literal["auto", "cpu", "gpu"]
"""Where to compute; auto takes GPUs if there are any."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of the container that this process is in."""
EMPTY_IS_UNSET = (
    *("RAY_", "MLFLOW_", "XDG_", "AWS_", "GOOGLE_", "TORCH", "TUNE_", "MPL", "OMP_", "GOMP_", "MKL_"),
    *("HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP"),
)
"""What the names of variables begin with that are as if they were not set when they are empty."""
SHORT_FOLDERS = (Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"))
"""Where Ray's sockets may lie, if the folder for temporary files has too long a path for them."""
SOCKET_BYTES = 36
"""Most bytes of the path of the folder that Ray's sessions are in: Linux and macOS allow a socket 107 and 103 of them,
and Ray's own folders and names take up to 67."""


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer if its container has a quota of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_cores())))


def threads_per_process(num_processes: int) -> int:
    """Threads for each of the processes that share the usable cores."""
    return max(1, usable_cores() // num_processes)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees instead of returning it to the system.

    Images, blocks and activations are so large that the C library would map new memory for each, which the kernel fills
    with zeros: 7 % of the time per decoded image, 10 % of a small model's step (docs/benchmarks). Only glibc has the
    switch; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(parameter, 1 << 30)


def local_processes(num_workers: int) -> int:
    """Workers on this node: as whoever started this one says (Ray Train and torchrun do), else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_workers))


def to_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Copy small tensors of the CPU to a device, a GPU too, without waiting until it has done what came before."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    pinned = (tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in tensors)
    return [tensor.to(device, non_blocking=True) for tensor in pinned]


def _cgroup_cores() -> float:
    """The quota in cores, infinite without one."""
    try:  # version 2: "max 100000", or quota and period in microseconds
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1: -1 is no quota
        files = (CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (file.read_text(encoding="utf-8") for file in files)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def settle_environment() -> None:
    """Make of this process's environment one that libraries can live with; its children inherit it.

    - A variable of EMPTY_IS_UNSET that is empty counts as one that is not set. (In others, such as
      CUDA_VISIBLE_DEVICES, where it means no GPU, and http_proxy, it has a meaning.)
    - A user whom the system does not know, as in a container that runs under any number, gets a name: USER.
    - Where there is no home folder, HOME is a folder below the one for temporary files: MLflow and Ray need one. Where
      it cannot be written, Matplotlib gets one there: it would print a paragraph.

    Raises: ValueError if there is no place for such a folder.
    """
    for name in [name for name, value in os.environ.items() if not value and name.startswith(EMPTY_IS_UNSET)]:
        del os.environ[name]
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        os.environ["USER"] = f"user{_user_id()}"
    home = home_folder()
    if home is None:
        os.environ["HOME"] = str(own_temporary_folder())
    elif not os.access(home, os.W_OK):
        with contextlib.suppress(ValueError):
            os.environ.setdefault("MPLCONFIGDIR", str(own_temporary_folder() / "matplotlib"))


def home_folder() -> Path | None:
    """The home of this user, if there is such a folder."""
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None
    return home if home.is_absolute() and home.is_dir() else None


def cache_folders() -> Iterator[Path]:
    """Where files may be kept that can be made again, the best place first: take the first that can be written.

    XDG_CACHE_HOME if that is an absolute path, .cache in the home, and a folder of this user's below the one for
    temporary files. They need not exist. What was written to one of them is found by looking into all.
    """
    given, home = os.environ.get("XDG_CACHE_HOME", ""), home_folder()
    if os.path.isabs(given):
        yield Path(given) / "mixmae"
    if home is not None:
        yield home / ".cache" / "mixmae"
    with contextlib.suppress(ValueError):
        yield own_temporary_folder() / "mixmae"


def own_temporary_folder() -> Path:
    """A folder of this user's alone below the one for temporary files; the same in every process.

    Raises: ValueError if it cannot be made, or is another user's.
    """
    remedy = "set TMPDIR to a folder that you can write to."
    try:
        folder = Path(tempfile.gettempdir()) / f"mixmae-{_user_id()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        is_own = folder.lstat().st_uid == _user_id() and os.access(folder, os.W_OK)
    except OSError as error:
        raise ValueError(f"There is no folder for temporary files ({error}): {remedy}") from error
    if not is_own:
        raise ValueError(f"The folder for temporary files, {folder}, is another user's: {remedy}")
    return folder


def ray_folder() -> Path:
    """Where a Ray cluster of this machine keeps its sessions: below RAY_TMPDIR, or the first folder short enough.

    Raises: ValueError if none is.
    """
    given = os.environ.get("RAY_TMPDIR")
    if given and not _holds_sockets(Path(given)):
        raise ValueError(
            f"RAY_TMPDIR is {given}: Ray needs a folder that can be written, with a path of at most {SOCKET_BYTES} "
            "bytes, because those of sockets are limited."
        )
    places = [Path(given)] if given else [Path(tempfile.gettempdir()), *SHORT_FOLDERS]
    folder = next((place for place in places if _holds_sockets(place)), None)
    if folder is None:
        raise ValueError(
            f"No folder for temporary files has a path of at most {SOCKET_BYTES} bytes, which Ray's sockets need: set "
            "RAY_TMPDIR to such a folder that can be written."
        )
    return folder / "ray"


def _holds_sockets(folder: Path) -> bool:
    return len(os.fsencode(folder)) <= SOCKET_BYTES and folder.is_dir() and os.access(folder, os.W_OK)


def _user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows has none, and a folder of this user's alone
