"""How many workers each start has, and when a run starts again with more; no Ray cluster is started."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mixmae.share import WorkerRange
from mixmae.training import cluster, elastic
from mixmae.training.elastic import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    PATIENCE_S,
    SETTLE_S,
    STEADY_S,
    Elastic,
    Growth,
)
from mixmae.training.failures import Interrupted, WorkersFailed


class Clock:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TestChoose:
    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def notes(self):
        return []

    @pytest.fixture
    def choose(self, monkeypatch, clock, notes):
        """A choice where the room is as a function of the seconds since its begin."""

        def run(workers, room):
            begin = clock.now
            monkeypatch.setattr(elastic, "room", lambda *, use_gpu: room(clock.now - begin))
            chosen = Elastic(WorkerRange.parse(workers), use_gpu=False, num_blocks=64, note=notes.append, clock=clock)
            return chosen.choose(clock.sleep), clock.now - begin

        return run

    def test_one_number_asks_nobody(self, choose):
        assert choose("3", lambda _: 0) == (3, 0)

    def test_the_most_that_there_is_room_for(self, choose, notes):
        assert choose("2:8", lambda _: 64) == (8, 0)
        assert choose("2:8", lambda _: 5) == (5, SETTLE_S)
        assert choose("2:8", lambda s: 3 if s < 4 else 6) == (6, 4 + SETTLE_S)  # what failed comes back
        assert choose("2:8", lambda s: 7 if s < 4 else 6) == (6, 4 + SETTLE_S)  # a node that was dead already
        assert choose("2:8", lambda s: 3 if s < 4 else 8) == (8, 4)
        assert notes == []

    def test_the_least_is_waited_for(self, choose, notes):
        assert choose("2:8", lambda s: 1 if s < 500 else 4) == (4, 500 + SETTLE_S)
        line = "the cluster has room for 1 workers, and --workers 2:8 asks for at least 2"
        assert notes == [f"{line}: waiting for nodes"]
        with pytest.raises(WorkersFailed, match=f"after 6 hours {line}"):
            choose("2:8", lambda _: 1)

    def test_but_not_when_somebody_stops_the_run(self, monkeypatch, clock):
        monkeypatch.setattr(elastic, "room", lambda *, use_gpu: 0)

        def sleep(seconds):
            clock.sleep(seconds)
            if clock.now > 1100:
                raise Interrupted(15)

        with pytest.raises(Interrupted):
            Elastic(WorkerRange(1, 2), use_gpu=False, num_blocks=4, clock=clock).choose(sleep)
        assert clock.now < 1000 + PATIENCE_S


class TestGrowth:
    @pytest.fixture
    def clock(self):
        return Clock()

    def grows_after(self, growth, clock, is_room=lambda seconds: True):
        begin = clock.now
        while not growth.wants(is_room(clock.now - begin)):
            clock.sleep(5)
            assert clock.now < begin + 100_000
        return clock.now - begin

    def test_room_must_stay(self, clock):
        growth = Growth(clock)
        growth.started(2)
        assert self.grows_after(growth, clock, lambda s: s > 900) == 905 + STEADY_S
        growth.started(3)
        flickers = lambda s: s % 50 != 0 or s > 2000  # noqa: E731
        assert self.grows_after(growth, clock, flickers) == 2005 + STEADY_S

    def test_a_node_that_comes_and_goes_does_not_take_the_run_with_it(self, clock):
        """Each time there is room for a third worker the group fails a minute after it was made larger."""
        growth = Growth(clock)
        growth.started(2)
        pauses = []
        for _ in range(6):
            pauses.append(self.grows_after(growth, clock))
            growth.started(3)
            clock.sleep(60)
            growth.failed()
            growth.started(2)
        doubled = [FIRST_PAUSE_S * 2**number for number in range(6)]
        assert pauses == [min(pause, LONGEST_PAUSE_S) for pause in doubled]
        self.grows_after(growth, clock)
        growth.started(3)
        clock.sleep(LONGEST_PAUSE_S + 1)  # the node has stayed
        growth.failed()
        growth.started(2)
        assert self.grows_after(growth, clock) == FIRST_PAUSE_S

    def test_growing_in_vain_is_tried_ever_more_seldom(self, clock):
        growth = Growth(clock)
        growth.started(2)
        pauses = []
        for _ in range(5):
            pauses.append(self.grows_after(growth, clock))
            growth.started(2)
        assert pauses == [FIRST_PAUSE_S * factor for factor in (1, 2, 4, 8, 12)]

    def test_a_failure_that_has_nothing_to_do_with_it(self, clock):
        growth = Growth(clock)
        growth.started(2)
        growth.failed()
        growth.started(2)
        assert self.grows_after(growth, clock) == FIRST_PAUSE_S


class TestWatching:
    @pytest.fixture
    def watch(self, monkeypatch):
        """How often the workers are asked to end within half a second, and what people are told."""
        monkeypatch.setattr(elastic, "LOOK_S", 0.01)
        monkeypatch.setattr(elastic, "STEADY_S", 0.05)
        monkeypatch.setattr(elastic, "FIRST_PAUSE_S", 0.05)
        monkeypatch.setattr(elastic, "SETTLE_S", 0.0)

        def run(workers, there, beside, *, num_blocks=64, heard=("started",)):
            monkeypatch.setattr(elastic, "room", lambda *, use_gpu: there)
            monkeypatch.setattr(elastic, "room_beside", lambda held, *, use_gpu: beside)
            notes, asked = [], []
            mailbox = SimpleNamespace(request_stop=SimpleNamespace(remote=lambda: asked.append(1)))
            chosen = Elastic(WorkerRange.parse(workers), use_gpu=False, num_blocks=num_blocks, note=notes.append)
            chosen.choose(time.sleep)
            with chosen.watching(mailbox, set(heard)):
                time.sleep(0.5)
            assert chosen.grows == bool(asked)
            return chosen.count, notes, asked

        return run

    def test_the_workers_are_asked_to_end_when_there_is_room(self, watch):
        count, notes, asked = watch("2:4", 2, 9)
        assert count == 2
        assert notes == ["there is room for 4 workers: saving, and starting again with more than 2"]
        assert len(asked) > 1  # again, should the mailbox have forgotten it

    @pytest.mark.parametrize(
        ("workers", "there", "beside", "options"),
        [
            ("2:4", 4, 9, {}),  # all that may be are there
            ("2", 2, 9, {}),
            ("2:4", 2, 2, {}),
            ("2:8", 4, 7, {"num_blocks": 8}),  # of 8 parts each of 7 workers, too, has up to 2
            ("2:4", 2, 9, {"heard": ()}),  # there is nothing to save yet
        ],
    )
    def test_else_they_are_left_alone(self, watch, workers, there, beside, options):
        assert watch(workers, there, beside, **options) == (min(there, int(workers[-1])), [], [])


class TestRoom:
    """Of nodes as Ray describes them."""

    @pytest.fixture
    def nodes(self, monkeypatch):
        def set_up(*nodes, silent=(), draining=()):
            described = [
                {
                    "NodeID": f"n{index}",
                    "Alive": True,
                    "NodeManagerAddress": "127.0.0.1",
                    "NodeManagerPort": index,
                    "Resources": total,
                }
                for index, (total, _) in enumerate(nodes)
            ]
            free = {f"n{index}": free for index, (_, free) in enumerate(nodes)}
            state = cluster.ray._private.state
            monkeypatch.setattr(cluster.ray, "nodes", lambda: described)
            monkeypatch.setattr(state, "available_resources_per_node", lambda: free)
            monkeypatch.setattr(state.state, "get_draining_nodes", lambda: {f"n{index}": 0 for index in draining})
            monkeypatch.setattr(cluster, "_answers", lambda node: node["NodeManagerPort"] not in silent)

        return set_up

    def test_on_cores_one_is_left_for_decoding(self, nodes):
        nodes(({"CPU": 4.0}, {"CPU": 4.0}), ({"CPU": 4.0}, {"CPU": 1.5}), ({"memory": 1.0}, {}))
        assert cluster.room(use_gpu=False) == 4  # 4 and 1 places, 5.5 CPUs
        nodes(({"CPU": 1.0}, {"CPU": 1.0}))
        assert cluster.room(use_gpu=False) == 0

    def test_a_gpu_needs_a_cpu_beside_it(self, nodes):
        full = {"CPU": 8.0, "GPU": 4.0}
        nodes((full, full), (full, {"CPU": 1.0, "GPU": 4.0}), ({"CPU": 16.0}, {"CPU": 16.0}))
        assert cluster.room(use_gpu=True) == 5
        nodes((full, {"CPU": 4.0, "GPU": 4.0}))
        assert cluster.room(use_gpu=True) == 3  # the fourth CPU decodes

    def test_nodes_that_are_gone_or_going_do_not_count(self, nodes):
        node = ({"CPU": 2.0}, {"CPU": 2.0})
        nodes(node, node, node, node, silent=[1], draining=[3])
        assert cluster.room(use_gpu=False) == 3
        assert cluster.room_beside(0, use_gpu=False) == 3

    def test_room_beside_workers_that_are_there(self, nodes):
        two, busy = {"CPU": 2.0}, {"CPU": 0.0}
        nodes((two, busy), (two, {"CPU": 1.0}))  # three workers, and decoding rests: its CPU is no place
        assert cluster.room_beside(3, use_gpu=False) == 3
        nodes((two, busy), (two, busy), (two, {"CPU": 1.5}))  # another node, on which decoding is by now
        assert cluster.room_beside(3, use_gpu=False) == 4
        nodes((two, {"CPU": 1.0}), (two, busy), (two, two))  # the same, resting
        assert cluster.room_beside(3, use_gpu=False) == 5
        gpus = {"CPU": 8.0, "GPU": 4.0}
        nodes((gpus, {"CPU": 0.5, "GPU": 0.0}), (gpus, {"CPU": 0.5, "GPU": 3.0}))  # decoding has all CPUs, but may go
        assert cluster.room_beside(4, use_gpu=True) == 7


def test_a_node_answers_or_does_not():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert cluster._answers(node)
    assert not cluster._answers(node)
