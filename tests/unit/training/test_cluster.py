"""What a cluster cannot hold, and one that does not answer: a sentence, within seconds."""

from __future__ import annotations

import socket

import pytest

from mixmae.training import cluster


def test_more_workers_than_the_cluster_has(monkeypatch):
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(cluster.ClusterError, match=r"5 workers need 6 CPUs.*has 4.*--workers to 3"):
        cluster.require_resources(num_workers=5, use_gpu=False, wait_s=0)
    with pytest.raises(cluster.ClusterError, match=r"2 workers need 2 GPUs but the cluster has 0.*--device cpu"):
        cluster.require_resources(num_workers=2, use_gpu=True, wait_s=0)
    cluster.require_resources(num_workers=3, use_gpu=False, wait_s=0)
    # CPUs for decoding are needed beside GPUs: without one the run would wait for ever.
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(cluster.ClusterError, match=r"2 workers need 3 CPUs.*lower --workers to 1 or add nodes"):
        cluster.require_resources(num_workers=2, use_gpu=True, wait_s=0)
    # A local cluster has as many logical CPUs as were asked for: its cores are the limit.
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 10_000.0})
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(cluster.ClusterError, match="would only wait for each other"):
        cluster.join(None, num_workers=5_000)
    assert cluster.join(None, num_workers=1, num_trials=3_000) is False  # trials take turns


def test_a_cluster_that_does_not_answer_is_said_within_seconds():
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(cluster.ClusterError, match="No Ray cluster answers at"):
            cluster.connect(address, num_workers=1)


@pytest.mark.parametrize(
    ("address", "device", "gpus", "workers"),
    [
        (None, "auto", 0, 6),
        (None, "auto", 4, 4),
        (None, "cpu", 4, 6),
        (None, "gpu", 0, 1),  # join then says that there are none
        ("head:6379", "auto", 4, 1),
    ],
)
def test_default_workers(monkeypatch, address, device, gpus, workers):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "usable_cores", lambda: 6)
    monkeypatch.setattr(cluster.torch.cuda, "device_count", lambda: gpus)
    assert cluster.default_workers(address, device) == workers


def test_a_submitted_job_takes_one_worker_by_default(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(cluster, "usable_cores", lambda: 6)
    assert cluster.default_workers(None, "cpu") == 1
