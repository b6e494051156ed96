"""Faults of a run on a cluster of this machine: a head and nodes (raylets) that join, are told to go, and die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.drilling.faulty import FAULT, HURRY
from benchmarks.drilling.ground import FAULTY, LIMIT_S, ROOT, SETTINGS, Ground, LeftOut, Outcome, Program, recovery
from mixmae.training.checkpoint import list_checkpoints
from tests.mlflow_server import free_port

RAY = str(Path(sys.executable).with_name("ray"))
PACE_S = 0.4
"""For a step, where a node shall go or come in the middle of a run."""
NOTICE_S = 15


class Node:
    """A raylet with all that belongs to it."""

    def __init__(self, words: list[str], cwd: Path, variables: dict[str, str]) -> None:
        self._program = Program(words, cwd, variables)
        try:
            self._program.wait_for("--block")
        except RuntimeError:
            self.kill()
            raise

    def processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._program.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    @property
    def id(self) -> str:
        words = [word for process in self.processes() if process.name() == "raylet" for word in process.cmdline()]
        return next(word.partition("=")[2] for word in words if word.startswith(("--node_id=", "--node-id=")))

    @property
    def has_worker(self) -> bool:
        """Whether a worker trains here."""
        return any("RayTrainWorker" in _title(process) for process in self.processes())

    def kill(self) -> None:
        """Kill the raylet, as the loss of a machine does; all else there ends with it."""
        processes = sorted(self.processes(), key=lambda process: process.name() != "raylet")
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._program.kill()

    def end(self) -> None:
        """End it as Ctrl-C does."""
        processes = self.processes()
        self._program.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._program.process.wait(30)
        self._program.kill()
        psutil.wait_procs(processes, timeout=10)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@dataclass
class Cluster:
    """A head that stays, and two nodes beside it, with a CPU each: two workers, and one for decoding.

    Args: head: further words for the head.
    """

    folder: Path
    head_words: tuple[str, ...] = ()
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.variables = kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of jobs, too
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }
        port, dashboard = free_port(), free_port()
        self.address, self.jobs_address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._start = [RAY, "start", "--block", "--disable-usage-stats", "--num-cpus"]
        words = ["1", "--head", "--port", str(port), "--temp-dir", f"/tmp/drill_{port}"]
        words += ["--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(free_port())]
        words += self.head_words or ("--object-store-memory", "300000000")
        self.head = Node([*self._start, *words], self.folder, self.variables)

    def have(self, count: int) -> None:
        """Add nodes until there are so many."""
        self.nodes = [node for node in self.nodes if node.processes()]
        while len(self.nodes) < count:
            words = ["1", "--address", self.address, "--object-store-memory", "300000000"]
            self.nodes.append(Node([*self._start, *words], self.folder, self.variables))

    def one_that_trains(self) -> Node:
        """A node with a worker; it is no longer counted."""
        node = next(node for node in self.nodes if node.has_worker)
        self.nodes.remove(node)
        return node

    def call(self, *words: str) -> str:
        """A command of ray's.   Returns: what it printed.   Raises: RuntimeError."""
        done = subprocess.run(
            [RAY, *words], cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=LIMIT_S
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout

    def close(self) -> None:
        for node in (*self.nodes, self.head):
            node.end()


@contextlib.contextmanager
def on_cluster(ground: Ground, *head_words: str) -> Any:
    """Yields: a cluster and the ground on it; the same for all who ask for no words of their own."""
    if head_words:
        cluster = Cluster(ground.folder / "cluster2", head_words)
    else:
        cluster = _shared.get(ground.folder) or Cluster(ground.folder / "cluster")
        _shared[ground.folder] = cluster
    try:
        variables = {name: value for name, value in cluster.variables.items() if os.environ.get(name) != value}
        yield cluster, replace(ground, workers=2, variables=variables, flags=("--ray-address", cluster.address))
    finally:
        if head_words:
            cluster.close()


_shared: dict[Path, Cluster] = {}


def close_clusters() -> None:
    """End what on_cluster has started."""
    while _shared:
        _shared.popitem()[1].close()


def _last_step(run: Program) -> int:
    return max((step for _, step in run.steps), default=0)


def node_replaced(ground: Ground) -> Outcome:
    with on_cluster(ground) as (cluster, here):
        cluster.have(2)
        reference, output = ground.undisturbed(2), here.folder / "node_replaced"
        run = here.start(output)
        run.wait_for(r"^step 25/")
        struck, beyond = time.time(), _last_step(run)
        cluster.one_that_trains().kill()
        cluster.have(2)
        assert run.wait() == 0, run.text
        said = run.line("starting new workers")
        outcome = Outcome("SIGKILL of the raylet of one of 2 workers; another node joins", said=said)
        outcome.recovered_s = recovery(run, struck, beyond)
        return here.compare(outcome, output, reference)


def node_lost(ground: Ground) -> Outcome:
    with on_cluster(ground) as (cluster, here):
        cluster.have(2)
        reference, output = ground.undisturbed(2), here.folder / "node_lost"
        run = here.start(output, workers="1:2")
        run.wait_for(r"^step 25/")
        struck, beyond = time.time(), _last_step(run)
        cluster.one_that_trains().kill()
        assert run.wait() == 0, run.text
        assert run.line("training with 1 workers of 1:2"), run.text
        said = f"{run.line('starting new workers')}; {run.line('training with 1 workers')}"
        outcome = Outcome("the same with --workers 1:2, and no other node", recovery(run, struck, beyond), said=said)
        return here.compare(outcome, output, reference, exact=False)


def node_returns(ground: Ground) -> Outcome:
    with on_cluster(ground) as (cluster, here):
        cluster.have(2)
        reference, output = ground.undisturbed(2), here.folder / "node_returns"
        run = here.start(output, workers="1:2", pace_s=PACE_S)
        run.wait_for(r"^step 20/")  # the checkpoint of step 10 is there
        cluster.one_that_trains().kill()
        run.wait_for("training with 1 workers of 1:2")
        run.wait_for("continuing from step")
        struck, beyond = time.time(), _last_step(run)
        cluster.have(2)
        run.wait_for("there is room for 2 workers")
        (here.notes(output) / HURRY).touch()
        assert run.wait() == 0, run.text
        counts = [json.loads(line)["workers"] for line in (output / "starts.jsonl").read_text().splitlines()]
        assert counts == [2, 1, 2], counts
        outcome = Outcome("the same, and a node comes back later", recovery(run, struck, beyond))
        outcome.said = run.line("there is room for 2 workers")
        return here.compare(outcome, output, reference, exact=False)


def node_preempted(ground: Ground) -> Outcome:
    with on_cluster(ground) as (cluster, here):
        cluster.have(2)
        reference, output = ground.undisturbed(2), here.folder / "node_preempted"
        run = here.start(output, pace_s=PACE_S)
        run.wait_for(r"^step 15/")
        before = list_checkpoints(output / "checkpoints")[0]
        node = cluster.one_that_trains()
        words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the drill")
        words += ("--deadline-remaining-seconds", str(NOTICE_S))
        cluster.call("drain-node", "--address", cluster.address, "--node-id", node.id, *words)
        told = time.time()
        run.wait_until(lambda: list_checkpoints(output / "checkpoints")[0] != before, "a checkpoint")
        saved_s = time.time() - told
        cluster.have(2)
        time.sleep(max(0.0, told + NOTICE_S - time.time()))
        struck, reached = time.time(), _last_step(run)
        node.kill()
        (here.notes(output) / HURRY).touch()
        assert run.wait() == 0, run.text
        starts = [json.loads(line)["step"] for line in (output / "starts.jsonl").read_text().splitlines()]
        outcome = Outcome(f"{NOTICE_S} s of notice for the node of one of 2 workers, then SIGKILL of its raylet")
        outcome.recovered_s = recovery(run, struck, reached)
        outcome.said = f"a checkpoint {saved_s:.0f} s after the notice; at step {reached}, continued from {starts[1:]}"
        return here.compare(outcome, output, reference)


def job_stopped(ground: Ground) -> Outcome:
    with on_cluster(ground) as (cluster, here):
        cluster.have(2)
        reference, output = ground.undisturbed(2), here.folder / "job_stopped"

        def submit(name: str) -> Program:
            variables = {FAULT: here.fault(output, pace_s=PACE_S), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
            # Without --working-dir: raylets of one machine share the folder of its copies, and delete each other's.
            runtime = json.dumps({"env_vars": {**variables, "PYTHONPATH": str(ROOT)}})
            words = [RAY, "job", "submit", "--address", cluster.jobs_address]
            words += ["--submission-id", f"{name}-{time.time_ns():x}", "--runtime-env-json", runtime, "--", "python"]
            words += [str(ROOT / FAULTY), *SETTINGS, "--output", str(output), "--workers", "2"]
            return Program(words, here.folder, cluster.variables)

        run = submit("first")
        run.wait_for(r"^step 25/")
        (job,) = set(re.findall(r"first-[0-9a-f]+", run.line("ray job stop first-")))  # a colour's code may follow
        sent = time.time()
        cluster.call("job", "stop", "--address", cluster.jobs_address, job)
        took = time.time() - sent
        run.wait()
        assert run.line("a checkpoint is made first"), run.text
        (here.notes(output) / HURRY).touch()
        second = submit("second")
        assert second.wait() == 0, second.text
        continuing = second.line("continuing from step")
        said = f"stopped after {took:.1f} s; {continuing}"
        outcome = Outcome("ray job submit, ray job stop, the same ray job submit", said=said)
        outcome.recovered_s = recovery(second, second.started, _last_step(run))
        return here.compare(outcome, output, reference)


HOG = """
import sys, time
import numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = []
while True:
    try:
        held.append(ray.put(np.random.default_rng(len(held)).bytes(8_000_000)))
        print("holds", len(held), flush=True)
    except Exception as error:
        print("full:", type(error).__name__, flush=True)
        break
time.sleep(15)
"""
"""Fills the object store and the disk behind it, and keeps both full for a while."""


def spill_disk_full(ground: Ground) -> Outcome:
    disk = ground.folder / "spilled"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "drill", str(disk)], capture_output=True).returncode:
        raise LeftOut("it needs the right to mount a tmpfs")
    try:
        words = ("--object-store-memory", "80000000", "--object-spilling-directory", str(disk))
        with on_cluster(ground, *words) as (cluster, here):
            cluster.have(1)
            output = here.folder / "spill_disk_full"
            run = here.start(output, pace_s=PACE_S, workers=1)
            run.wait_for(r"^step 10/")
            hog = Program([sys.executable, "-c", HOG, cluster.address], here.folder, cluster.variables)
            hog.wait_for("full:")
            struck, beyond = time.time(), _last_step(run)
            hog.wait()
            (here.notes(output) / HURRY).touch()
            assert run.wait() == 0, run.text
            said = f"{hog.line('full:')} {run.line('starting new workers')}"
            injected = "another program fills the object store (80 MB) and the disk for spilling (40 MB) for 15 s"
            outcome = Outcome(injected, recovery(run, struck, beyond), said=said)
            return here.compare(outcome, output, ground.undisturbed())
    finally:
        subprocess.run(["umount", str(disk)], check=False)


FAULTS = (node_replaced, node_lost, node_returns, node_preempted, job_stopped, spill_disk_full)
