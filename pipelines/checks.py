"""What doctor.py looks at: each check returns what was found and, unless all is well, what to do.

Those of a node run on each node of a cluster, or here. None of them starts Ray or changes anything that it leaves.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mixmae.data.sources.storage import plain_place
from mixmae.machine import Device, home_folder, own_temporary_folder, ray_folder, usable_cores
from mixmae.stores import store_uri, without_secrets
from mixmae.training.run_store import RunStore

GB = 1e9
LEAST_SHARED_MEMORY = 2 * GB
"""Ray's object store, which holds decoded batches, lies in /dev/shm; with less it goes to disk. Docker gives 64 MB."""
LEAST_FREE_DISK = 5 * GB
"""For Ray's logs and spilled objects, and for checkpoints on their way to the output."""
LEAST_MEMORY = 4 * GB
KERNELS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
"""Instruction sets that torch's and the decoder's speed depends on, by their names in /proc/cpuinfo."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name=name, verdict="ok", found=found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """A run works, but slower or with less."""
    return Finding(name=name, verdict="warn", found=found, remedy=remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """A run would not work."""
    return Finding(name=name, verdict="fail", found=found, remedy=remedy)


def check_node(device: Device, mlflow_uri: str | None, data: str | None) -> list[Finding]:
    """All checks that each node has to pass.   Args: device, data: as of a run.  mlflow_uri: None: not asked for."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_versions,
        check_cores,
        check_memory,
        lambda: check_gpus(device),
        check_shared_memory,
        check_temporary,
        check_home,
        check_jpegtran,
        check_ports,
    ]
    if mlflow_uri is not None:
        checks.append(lambda: check_mlflow(mlflow_uri))
    if data is not None:
        checks.append(lambda: check_data(data))
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # the others are to be seen too
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return fail(name, f"could not be looked at: {type(error).__name__}: {error}", "see the message")


def requirements() -> tuple[str, list[Requirement]]:
    """Which Python and which libraries pyproject.toml asks for."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():  # an installed package may be of an earlier version of this checkout
        content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return content["requires-python"], [Requirement(text) for text in content["dependencies"]]
    found = [Requirement(text) for text in importlib.metadata.requires("mixmae") or []]
    python = importlib.metadata.metadata("mixmae")["Requires-Python"]
    return python, [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def check_python() -> Finding:
    """The version of Python."""
    wanted, version = requirements()[0], platform.python_version()
    if version not in SpecifierSet(wanted, prereleases=True):
        return fail("Python", version, f"install Python {wanted} and make the environment anew")
    return ok("Python", f"{version} in {sys.prefix}")


def check_versions() -> Finding:
    """The libraries' versions, beside the ranges that pyproject.toml allows."""
    wrong, shown = [], []
    for wanted in requirements()[1]:
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, not {wanted.specifier}")
        if wanted.name in ("torch", "ray", "mlflow", "pyarrow"):
            shown.append(f"{wanted.name} {version}")
    if wrong:
        return fail("versions", "; ".join(wrong), "make setup, or pip install -c constraints.txt -e .")
    return ok("versions", ", ".join(shown))


def check_cores() -> Finding:
    """Cores, their instruction sets, and whether others use them."""
    cores, load = usable_cores(), os.getloadavg()[0]
    kernels = _instruction_sets()
    found = f"{cores} usable, {', '.join(kernels) if kernels else platform.machine()}"
    if load > 1.5 * cores:
        return warn("cores", f"{found}, load {load:.1f}", "other programs use them: training will wait for these")
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in kernels:
        return warn("cores", found, "without AVX2 decoding and training take several times as long: take newer cores")
    return ok("cores", found)


def _instruction_sets() -> list[str]:
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [name for flag, name in KERNELS.items() if flag in flags]


def check_memory() -> Finding:
    """Main memory."""
    memory = psutil.virtual_memory()
    found = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB are free"
    if memory.available < LEAST_MEMORY:
        return warn("memory", found, "end other programs: Ray ends workers where memory runs out")
    return ok("memory", found)


def check_gpus(device: Device) -> Finding:
    """GPUs, and whether torch can use them.   Args: device: as of a run."""
    import torch

    if device == "cpu":
        return ok("GPUs", "not asked for")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if names:
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        return ok("GPUs", f"{len(names)} ({names[0]}), {bf16}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, and install a torch for its driver"
        return fail("GPUs", f"nvidia-smi is there, but torch ({built}) sees none", remedy)
    if device == "gpu":
        return fail("GPUs", "none", "give --device cpu, or take a machine with GPUs")
    return ok("GPUs", "none: training on cores")


def check_workers(workers: int, device: Device) -> Finding:
    """Whether this machine has a GPU, or without GPUs a core, for each worker."""
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    room = gpus or usable_cores()
    found = f"{workers} for {room} {'GPU' if gpus else 'core'}{'s' * (room != 1)}"
    if workers > room:
        return fail("workers", found, f"lower --workers to {room} or less")
    return ok("workers", found)


def check_shared_memory() -> Finding:
    """Room for Ray's object store."""
    place = Path("/dev/shm")
    if not place.is_dir():  # macOS
        return ok("/dev/shm", "none on this system: Ray's object store lies in the temporary folder")
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB are free"
    if usage.free < LEAST_SHARED_MEMORY:
        return warn("/dev/shm", found, "give the container more (docker run --shm-size 8g, in Kubernetes an emptyDir)")
    return ok("/dev/shm", found)


def check_temporary() -> Finding:
    """The folders for temporary files and for Ray's sessions."""
    try:
        folder, sessions = own_temporary_folder().parent, ray_folder()
        with tempfile.TemporaryFile() as file:
            file.write(b"written")
    except (OSError, ValueError) as error:
        return fail("TMPDIR", str(error), "set TMPDIR to a folder on a local disk that can be written")
    free = min(shutil.disk_usage(place).free for place in (folder, sessions.parent))
    found = f"{folder}, Ray's sessions in {sessions}, {free / GB:.1f} GB free"
    if free < LEAST_FREE_DISK:
        return warn("TMPDIR", found, "make room, or set TMPDIR (and RAY_TMPDIR) to another disk")
    return ok("TMPDIR", found)


def check_home() -> Finding:
    """The home folder, where Ray keeps its token and caches lie."""
    home = home_folder()
    if home is None or not os.access(home, os.W_OK):
        remedy = "set HOME to a folder that can be written, or RAY_AUTH_TOKEN and XDG_CACHE_HOME on a cluster"
        return warn("HOME", f"{home or 'no such folder'} cannot be written", remedy)
    return ok("HOME", str(home))


def check_jpegtran() -> Finding:
    """The program that makes tiled JPEGs when images are packed."""
    if found := shutil.which("jpegtran"):
        return ok("jpegtran", found)
    remedy = "apt-get install libjpeg-turbo-progs: without it shards have no tiles, and crops decode whole images"
    return warn("jpegtran", "not installed", remedy)


def check_ports() -> Finding:
    """Whether this machine's name leads to it, and a port can be opened."""
    name = socket.gethostname()
    try:
        with socket.create_server(("", 0)) as server:
            address = socket.gethostbyname(name)
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    except OSError as error:
        remedy = f"add {name} to /etc/hosts with this machine's address, and allow connections to itself"
        return fail("ports", f"{name} cannot be reached from itself ({error})", remedy)
    return ok("ports", f"{name} is {address} and takes connections")


def check_mlflow(uri: str) -> Finding:
    """Whether MLflow's store can be used.   Args: uri: absolute."""
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        place = next(path for path in (file, *file.parents) if path.exists())
        if not os.access(place, os.W_OK):
            return fail("MLflow", f"{place} cannot be written", "give another --mlflow-uri, or another --output")
        return ok("MLflow", f"{uri} on this machine")
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=10) as answer:
            answer.read()
    except (OSError, ValueError) as error:
        remedy = "start it (mlflow server --host 0.0.0.0), correct --mlflow-uri, or open the firewall"
        return fail("MLflow", f"{uri} does not answer ({getattr(error, 'reason', error)})", remedy)
    return ok("MLflow", f"{uri} answers")


def check_data(data: str) -> Finding:
    """Whether the first image of a source can be read and decoded.   Args: data: what --data is."""
    from mixmae.data.images.decode import decode_rgb
    from mixmae.data.source import read_rows
    from mixmae.data.sources import list_splits, open_source

    try:
        splits = list_splits(data)
        source = open_source(data, "train" if "train" in splits else splits[0])
        height, width, _ = decode_rgb(read_rows(source, [0])[0].data).shape
    except (ValueError, OSError) as error:
        return fail("data", str(error), "correct --data; on a cluster it must be on storage that all nodes see")
    return ok("data", f"{plain_place(data)}: {source.num_rows} images, the first has {width} x {height} pixels")


def write_mark(output: Path) -> tuple[Path, str]:
    """Leave a file that nodes are to find, in the output folder or the nearest folder above it that is there.

    Returns: the file and its content.   Raises: OSError.
    """
    output = output.resolve()
    folder = next(path for path in (output, *output.parents) if path.is_dir())
    file, content = folder / f".doctor.{secrets.token_hex(8)}", secrets.token_hex(8)
    with file.open("x") as mark:  # as the lock of a run is made
        mark.write(content)
    return file, content


def answer_mark(file: Path, content: str, node: str) -> str:
    """Read what write_mark wrote, on a node, and leave an answer beside it.   Returns: the trouble, or nothing."""
    try:
        if file.read_text() != content:
            return "has other content"
        answer = file.with_name(f"{file.name}.{node}")
        partial = answer.with_name(f"{answer.name}.partial")
        partial.write_text(content)
        partial.replace(answer)
    except OSError as error:
        return f"{error.strerror}"
    return ""


def _check_store(uri: str) -> Finding:
    """Whether a run's folder in a store can be written and read."""
    shown = without_secrets(uri)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = RunStore.of(uri, Path(folder))
            assert store is not None
            content = secrets.token_hex(8).encode()
            store.write(f".doctor.{os.getpid()}", content)
            is_same = store.read(f".doctor.{os.getpid()}") == content
            store.delete(f".doctor.{os.getpid()}")
    except (ValueError, OSError) as error:
        return fail("output", f"{shown} cannot be written and read: {error}", "give an --output that can be written")
    if not is_same:
        return fail("output", f"{shown} gives back something else than what was written", "ask who runs the store")
    return ok("output", f"{shown}, written, read and deleted; from this machine")


def check_output(output: Path, answer: Callable[[Path, str], dict[str, str]]) -> Finding:
    """Whether a run's folder can be written, and is the same one on all nodes.

    Args: answer: lets every node call answer_mark; returns the troubles by node.
    """
    remedy = "give an --output that can be written"
    if uri := store_uri(output):
        return _check_store(uri)
    try:
        file, content = write_mark(output)
    except OSError as error:
        return fail("output", f"{output} cannot be written ({error.strerror})", remedy)
    try:
        troubles = answer(file, content)
        there = {path.name for path in file.parent.glob(f"{file.name}.*")}
        unseen = [node for node, trouble in troubles.items() if trouble or f"{file.name}.{node}" not in there]
        free = shutil.disk_usage(file.parent).free
    finally:
        for path in file.parent.glob(f"{file.name}*"):
            path.unlink()
    if unseen:
        count, first = len(unseen), f"{unseen[0]}: {troubles[unseen[0]] or 'what it wrote is not there'}"
        remedy = "mount one file system under the same path on all nodes, and name a folder of it by --output"
        return fail("output", f"{file.parent} is not shared by {count} of {len(troubles)} nodes ({first})", remedy)
    where = f" on {len(troubles)} node{'s' * (len(troubles) != 1)}" if troubles else ""
    found = f"{file.parent}, written and read{where}, {free / GB:.1f} GB free"
    if free < LEAST_FREE_DISK:
        return warn("output", found, "make room: checkpoints of the paper's models have 0.3 to 3 GB")
    return ok("output", found)
