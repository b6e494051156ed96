"""Joining a Ray cluster, or starting one on this machine: the same way for all pipelines."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
import torch

from mixmae.machine import Device, home_folder, ray_folder, settle_environment, usable_cores


class ClusterError(ValueError):
    """The cluster cannot run what was asked for; the message says why and what to do."""


def is_own(address: str | None) -> bool:
    """Whether a run starts Ray for itself on this machine.   Args: address: as in `join`."""
    return not (address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())


def default_workers(address: str | None, device: Device) -> int:
    """How many workers a run takes by default: one per GPU of this machine; without GPUs one per core.

    On a CPU, processes of one thread each make more images per second than threads of one process, which wait for each
    other at every operation, and for a core that another program uses.

    Args: as in `join`. On a cluster it is 1: what is there may be others', or not be started yet.
    """
    if not is_own(address):
        return 1
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return num_gpus or (1 if device == "gpu" else usable_cores())


def join(
    address: str | None,
    *,
    num_workers: int,
    most_workers: int | None = None,
    device: Device = "auto",
    num_trials: int | None = None,
    slots: Mapping[str, float] | None = None,
    dashboard: bool = False,
) -> bool:
    """Join or start Ray and check that it can hold the workers.

    Args:
        address: of a cluster; None takes RAY_ADDRESS, which `ray job submit` sets, else starts a local one.
        num_workers: processes of one run, one CPU each, or one CPU and one GPU each; the least number of them, if they
            may be `most_workers`.
        num_trials: runs at once, each with a process of its own beside its workers; None for a single run.
        slots, dashboard: as in `connect`.
    Returns: whether the workers use a GPU each.
    Raises: ClusterError.
    """
    is_own = not (address or os.environ.get("RAY_ADDRESS"))
    total = num_workers * (num_trials or 1)
    connect(address, num_workers=(most_workers or total) + (num_trials or 0), slots=slots, dashboard=dashboard)
    use_gpu = uses_gpu(device)
    require_resources(num_workers=total, use_gpu=use_gpu, wait_s=0.0 if is_own else 30.0)  # one of our own cannot grow
    cores = usable_cores()
    if is_own and not use_gpu and num_workers > cores:  # its CPUs are logical ones: Ray would not refuse
        raise ClusterError(
            f"{num_workers} workers on a machine of {cores} cores would only wait for each other: lower --workers to "
            f"{cores} or less."
        )
    return use_gpu


def connect(
    address: str | None, *, num_workers: int = 0, slots: Mapping[str, float] | None = None, dashboard: bool = False
) -> None:
    """Join a Ray cluster, or start one on this machine that ends with this process; nothing if that was done before.

    Args:
        address: as in `join`.
        num_workers: a local cluster gets logical CPUs for these beside one per core for decoding.
        slots, dashboard: a local cluster's own kinds of resources, and whether it has a dashboard.
    Raises: ClusterError if no cluster answers at the address, or none can be started here.
    """
    if ray.is_initialized():
        return
    settle_environment()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Logical CPUs only count tasks: the workers' share comes on top, so that decoding always finds one free.
        num_cpus = usable_cores() + num_workers
        # Threads that wait for each other spin for milliseconds by default. Where anything else runs on the same cores,
        # they spin while the one they wait for is not running, and steps take many times as long (docs/LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        # Ray lowers the priority of its workers by 15: beside one busy program they would get next to nothing.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that warns of nodes going away
        if not _may_keep_token():
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            folder = ray_folder()
        except ValueError as error:
            raise ClusterError(str(error)) from error
        try:
            ray.init(
                address="local",  # whatever clusters there are, or were, on this machine
                num_cpus=num_cpus,
                resources=dict(slots or {}),
                include_dashboard=dashboard,
                _temp_dir=str(folder),
                **quiet,
            )
        except Exception as error:  # Ray raises bare Exceptions
            raise ClusterError(
                f"Ray could not start on this machine ({str(error).splitlines()[0]}): where other programs take all "
                f"cores, stop some and give the command again; Ray's own log is in {folder}/session_latest/logs."
            ) from error
        return
    try:
        _check_listening(address)
        ray.init(address=address, **quiet)
    except OSError as error:  # ConnectionError is one
        raise ClusterError(
            f"No Ray cluster answers at {address} ({str(error).splitlines()[0]}): start one with `ray start --head`, "
            "correct --ray-address, or leave it out to run on this machine alone."
        ) from error


def _may_keep_token() -> bool:
    """Whether Ray can write, or has written, the token of this user's clusters to its place in the home folder."""
    home = home_folder()
    if home is None:
        return False
    kept = home / ".ray" / "auth_token"
    return os.access(kept, os.R_OK) or os.access(kept.parent if kept.parent.exists() else home, os.W_OK)


def _check_listening(address: str) -> None:
    """Open a connection to HOST:PORT; ray.init alone would try for minutes.   Raises: OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def room(*, use_gpu: bool) -> int:
    """Workers that would find a place now: a CPU each, or a CPU and a GPU; and decoding takes one CPU more.

    A run asks while it has no workers. Nodes that are to go, or do not answer though Ray has not noticed yet, do not
    count.
    """
    there = _nodes()
    free = ray._private.state.available_resources_per_node()
    kinds = ("CPU", "GPU") if use_gpu else ("CPU",)
    places = sum(min(int(free.get(node, {}).get(kind, 0)) for kind in kinds) for node in there)
    cpus = sum(free.get(node, {}).get("CPU", 0.0) for node in there)
    return max(0, min(places, int(cpus) - 1))


def room_beside(held: int, *, use_gpu: bool) -> int:
    """Workers that a run which has `held` could have if it were started again.

    Its own decoding goes from CPU to CPU, so that places on single nodes say little: sums are compared, and no more
    counted than all nodes have.
    """
    there = _nodes()
    free = ray._private.state.available_resources_per_node()
    scarce = "GPU" if use_gpu else "CPU"
    spare = int(sum(free.get(node, {}).get(scarce, 0.0) for node in there))
    kinds = ("CPU", "GPU") if use_gpu else ("CPU",)
    places = sum(min(int(total.get(kind, 0)) for kind in kinds) for total in there.values())
    cpus = sum(total.get("CPU", 0.0) for total in there.values())
    return min(held + spare, places, int(cpus) - 1)


def _nodes() -> dict[str, dict[str, float]]:
    """What each node has, by its id; without those that are gone or going."""
    draining = ray._private.state.state.get_draining_nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining and _answers(node)
    }


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether a node's raylet takes connections. Ray takes a node for dead only when it has been silent for a while."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=2).close()
    except OSError:
        return False
    return True


def uses_gpu(device: Device) -> bool:
    """Whether each worker uses a GPU of the cluster that was joined."""
    return device == "gpu" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def require_resources(*, num_workers: int, use_gpu: bool, wait_s: float) -> None:
    """Refuse what the cluster cannot hold, after giving an autoscaler `wait_s` seconds to bring nodes.

    Raises: ClusterError with what is there and what is needed.
    """
    # Decoding runs on CPUs too: the workers, one CPU each, must leave it one.
    needs = {"GPU": num_workers, "CPU": num_workers + 1} if use_gpu else {"CPU": num_workers + 1}
    deadline = time.monotonic() + wait_s
    while True:
        there = {kind: int(ray.cluster_resources().get(kind, 0)) for kind in needs}
        short = [kind for kind in needs if there[kind] < needs[kind]]
        if not short:
            return
        if time.monotonic() > deadline:
            kind = short[0]
            most = there[kind] - (needs[kind] - num_workers)
            fix = f"lower --workers to {most} or add nodes" if most >= 1 else "add nodes"
            spare = " (one per worker and one for decoding)" if kind == "CPU" else ""
            raise ClusterError(
                f"{num_workers} workers need {needs[kind]} {kind}s{spare} but the cluster has {there[kind]}: "
                f"{fix}{', or give --device cpu' if kind == 'GPU' else ''}."
            )
        time.sleep(1.0)
