"""Look at a machine, or at every node of a cluster, before a run: one line for each thing, with what to do about it.

    python pipelines/doctor.py [--output FOLDER] [--data SOURCE] [--workers N] [--device gpu] [--mlflow-uri URI]
        [--ray-address HOST:PORT]

Give it the flags of the run that is planned. Without --ray-address (or RAY_ADDRESS) it looks at this machine and starts
nothing. Exit status: 0 a run can start (warnings may be there), 1 something failed, 2 the command line is wrong.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mixmae.data.shards.plan import built_in
from mixmae.machine import Device
from mixmae.share import WorkerRange
from mixmae.tracking import TrackingError, resolve_uri
from pipelines.checks import Finding, answer_mark, check_node, check_output, check_workers, fail, ok, warn
from pipelines.command import command

ANSWER_S = 120.0
"""A node that takes longer than this to look at itself is reported."""
CLOCK_S = 2.0
"""Clocks that differ by more are reported: times in MLflow and in the files of a run would not fit together."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: flags as those of the run that is planned."""

    output: Path = Path("runs/demo")
    """Folder of the run; on a cluster one that all nodes share."""
    data: str | None = None
    """Where its images are. Without it: a built-in set, and nothing to look at."""
    workers: Annotated[int | str, tyro.conf.arg(metavar="N|MIN:MAX")] = 0
    """Training processes that the cluster must hold, of MIN:MAX the least number; 0: not asked for."""
    device: Device = "auto"
    """Where workers train; gpu: machines without one fail."""
    mlflow_uri: str | None = None
    """Tracking server. Default: MLFLOW_TRACKING_URI, else a file beside the output."""
    ray_address: str | None = None
    """Ray cluster whose nodes are looked at. Default: RAY_ADDRESS, else this machine alone, without Ray."""
    cluster_local: bool = False
    """Start Ray on this machine, as a run would, and look at its node."""

    def __post_init__(self) -> None:
        if self.workers not in (0, "0"):
            WorkerRange.parse(self.workers)

    @property
    def worker_range(self) -> WorkerRange | None:
        """None: not asked for."""
        return WorkerRange.parse(self.workers) if self.workers not in (0, "0") else None


def examine(arguments: Arguments) -> Iterator[Finding]:
    """All findings, in the order of the report."""
    try:
        uri = resolve_uri(arguments.mlflow_uri, arguments.output.parent)
    except TrackingError as error:
        uri = None
        yield fail("MLflow", str(error), "correct --mlflow-uri")
    data = None if arguments.data is None or built_in(arguments.data) else arguments.data
    if arguments.cluster_local or arguments.ray_address or os.environ.get("RAY_ADDRESS"):
        yield from examine_cluster(arguments, uri, data)
        return
    yield from check_node(arguments.device, uri, data)
    yield check_output(arguments.output, lambda file, content: {})
    if arguments.worker_range:
        yield check_workers(arguments.worker_range.least, arguments.device)


class NodeDoctor:
    """An actor on one node, which looks at it from there."""

    def __init__(self) -> None:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides the GPUs of who asked for none
            del os.environ["CUDA_VISIBLE_DEVICES"]

    def check(self, device: Device, uri: str | None, data: str | None) -> list[Finding]:
        """All checks of a node."""
        return check_node(device, uri, data)

    def clock(self) -> float:
        """What time it is here."""
        return time.time()

    def listen(self) -> tuple[str, int]:
        """Open a port for the other nodes, which gloo and NCCL do too.   Returns: its address."""
        import ray

        server = socket.create_server(("", 0))

        def take() -> None:
            while True:
                server.accept()[0].close()

        threading.Thread(target=take, daemon=True).start()
        return ray.util.get_node_ip_address(), server.getsockname()[1]

    def reach(self, addresses: Mapping[str, tuple[str, int]]) -> list[str]:
        """Connect to the ports of nodes.   Returns: those that cannot be reached, and why."""
        troubles = []
        for node, address in addresses.items():
            try:
                socket.create_connection(address, timeout=5).close()
            except OSError as error:
                troubles.append(f"{node} ({error})")
        return troubles

    def answer(self, file: Path, content: str, node: str) -> str:
        """As answer_mark."""
        return answer_mark(file, content, node)


def examine_cluster(arguments: Arguments, uri: str | None, data: str | None) -> Iterator[Finding]:
    """The findings about a cluster and, by an actor on each of them, about its nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from mixmae.training.cluster import ClusterError, connect, require_resources, room, uses_gpu

    try:
        connect(arguments.ray_address, num_workers=arguments.worker_range.most if arguments.worker_range else 0)
    except ClusterError as error:
        what, _, remedy = str(error).partition(": ")
        yield fail("cluster", what, remedy)
        return
    nodes = {_node_name(node): node for node in ray.nodes() if node["Alive"]}
    totals = ray.cluster_resources()
    store = totals.get("object_store_memory", 0) / 1e9
    counts = f"{totals.get('CPU', 0):.0f} CPUs, {totals.get('GPU', 0):.0f} GPUs, object store {store:.1f} GB"
    yield ok("cluster", f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {counts}, Ray {ray.__version__}")
    if wanted := arguments.worker_range:
        use_gpu = uses_gpu(arguments.device)
        try:
            require_resources(num_workers=wanted.least, use_gpu=use_gpu, wait_s=0)
            now = min(wanted.most, room(use_gpu=use_gpu)) if wanted.is_elastic else wanted.most
            yield ok("workers", f"{now} of {wanted} find a place now" if wanted.is_elastic else f"{wanted} fit")
        except ClusterError as error:
            what, _, remedy = str(error).partition(": ")
            yield fail("workers", what, remedy)
    if (
        uri is not None
        and uri.startswith("sqlite:")
        and len({node["NodeManagerHostname"] for node in nodes.values()}) > 1
    ):
        yield fail("MLflow", f"{uri} is a file of one machine", "start a server and give --mlflow-uri http://HOST:5000")
        uri = None
    doctor: Any = ray.remote(NodeDoctor)
    doctors = {
        name: doctor.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for name, node in nodes.items()
    }

    def ask(method: str, *words: Any) -> dict[str, Any]:
        """What each node answers; the exception of one that does not."""
        asked = {name: getattr(actor, method).remote(*words) for name, actor in doctors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        return {name: _get(reference) for name, reference in asked.items()}

    first = ask("clock")  # starts the actors, which takes seconds
    for name in [name for name, answer in first.items() if isinstance(answer, Exception)]:
        remedy = "see that it runs and has this environment; submit with --working-dir . (docs/cluster)"
        yield fail("node", f"{name} does not answer ({_first_line(first[name])})", remedy)
        del doctors[name]
    yield from merge(ask("check", arguments.device, uri, data))
    yield from check_clocks(doctors)
    addresses = {name: answer for name, answer in ask("listen").items() if not isinstance(answer, Exception)}
    for name, troubles in ask("reach", addresses).items():
        if troubles:
            what = f"{name} cannot reach {troubles if isinstance(troubles, Exception) else ', '.join(troubles)}"
            yield fail("network", what, "let nodes open connections to any port of each other")
    yield check_output(
        arguments.output,
        lambda file, content: {
            name: str(_get(actor.answer.remote(file, content, name))) for name, actor in doctors.items()
        },
    )


def _node_name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=ANSWER_S)
    except Exception as error:  # Ray has many kinds; all mean that the node could not do it
        return error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def check_clocks(doctors: Mapping[str, Any]) -> Iterator[Finding]:
    """How far the nodes' clocks are from this one.   Args: doctors: an actor per node."""
    off: dict[str, float] = {}
    for name, actor in doctors.items():
        before = time.time()
        there = _get(actor.clock.remote())
        after = time.time()
        if isinstance(there, float):  # the time of the answer's way is in doubt
            off[name] = max(0.0, abs(there - (before + after) / 2) - (after - before) / 2)
    worst = max(off, key=lambda name: off[name], default=None)
    if worst is None:
        return
    if off[worst] > CLOCK_S:
        yield warn("clocks", f"{worst} is {off[worst]:.1f} s off", "start a time service (chrony) on all nodes")
    else:
        yield ok("clocks", f"no two differ by more than {2 * max(off.values()) + 0.1:.1f} s")


def merge(answers: Mapping[str, Sequence[Finding] | Exception]) -> Iterator[Finding]:
    """The nodes' findings: what is well on several of them as one line, what is not as one for each."""
    found: dict[str, dict[str, Finding]] = {}
    for node, answer in answers.items():
        if isinstance(answer, Exception):
            yield fail("node", f"{node} could not be looked at ({_first_line(answer)})", "see Ray's logs there")
            continue
        for finding in answer:
            found.setdefault(finding.name, {})[node] = finding
    for name, by_node in found.items():
        well = {node: finding for node, finding in by_node.items() if finding.verdict == "ok"}
        kinds = sorted({finding.found for finding in well.values()})
        if name == "versions" and len(kinds) > 1:
            yield fail(name, f"nodes differ: {'; '.join(kinds)}", "use one environment, or image, on all nodes")
        elif well:
            where = f"{len(well)} nodes: " if len(answers) > 1 else ""
            yield ok(name, f"{where}{kinds[0]}{' and the like' if len(kinds) > 1 else ''}")
        for node, finding in by_node.items():
            if finding.verdict != "ok":
                yield replace(finding, found=f"{node}: {finding.found}" if len(answers) > 1 else finding.found)


def show(findings: Iterable[Finding]) -> int:
    """Print each finding as it comes.   Returns: the process's exit status."""
    counts = {"ok": 0, "warn": 0, "fail": 0}
    for finding in findings:
        counts[finding.verdict] += 1
        remedy = f"\n{'':16}-> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.verdict:5} {finding.name:9} {finding.found}{remedy}", flush=True)
    print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return 1 if counts["fail"] else 0


def doctor(arguments: Arguments) -> int:
    """Look at everything.   Returns: the process's exit status."""
    return show(examine(arguments))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(doctor, Arguments, argv, program="doctor.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
