"""The probe of pretraining: which images, what is measured, and that it changes and ends nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mixmae.data.blocks import eval_batches
from mixmae.data.sources import open_source
from mixmae.jobs import probe as module
from mixmae.jobs.pretraining import PretrainJob
from mixmae.jobs.probe import Probe, choose_probe
from mixmae.probing.features import extract_features
from mixmae.probing.online import OnlineProbeConfig, probe_features
from mixmae.training.failures import EvaluationSkipped
from pipelines.recipes import PRETRAIN_RECIPES

LABELS = [row % 4 for row in range(60)]


def _job(probe: Probe | None) -> PretrainJob:
    config = PRETRAIN_RECIPES["demo"]()
    config = replace(config, encoder=replace(config.encoder, embed_dim=8))  # of 64 px
    nothing: Any = None
    return PretrainJob(config=config, source=nothing, heldout=nothing, data=nothing, folder=nothing, probe=probe)


def test_it_is_the_librarys_and_leaves_the_model_and_the_generators_as_they_were(shards):
    source = open_source(shards("set", LABELS))
    probe = choose_probe(OnlineProbeConfig(images=60, k=5), source, source)
    assert probe is not None
    job = _job(probe)
    torch.manual_seed(0)
    model = job.build_model().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    drawn_from = torch.get_rng_state()
    metrics = job.evaluate(model, rank=0, num_workers=1)
    assert torch.equal(drawn_from, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    batches = eval_batches(source, 64, batch_size=64, rows=probe.rows)
    config = job.config
    features, labels = extract_features(model.encoder, batches, mean=config.pixel_mean, std=config.pixel_std)
    assert metrics.pop("perf/probe_s") > 0
    assert metrics == pytest.approx(probe_features(features, labels, 5))
    assert metrics["probe/linear_top1"] > 0.4  # colour


def test_references_are_of_the_untrained_encoder_and_of_pixels(shards):
    source = open_source(shards("set", LABELS))
    probe = choose_probe(OnlineProbeConfig(images=60, k=5), source, source)
    assert probe is not None
    job = _job(probe)
    model = job.build_model()
    metrics = job.evaluate_untrained(model, rank=0, num_workers=1)
    curve = {name: value for name, value in metrics.items() if name.startswith("probe/")}
    expected = {**job.evaluate(model, rank=0, num_workers=1), "perf/probe_s": metrics["perf/probe_s"]}
    assert {**curve, "perf/probe_s": metrics["perf/probe_s"]} == expected
    images = torch.cat([batch.images for batch in eval_batches(source, 64, batch_size=64, rows=probe.rows)])
    small = job.config.normalise(images).unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean(dim=(3, 5)).flatten(1)
    pixels = probe_features(small, torch.tensor(LABELS)[probe.rows], 5)
    assert {name: value for name, value in metrics.items() if name.startswith("reference/")} == {
        "reference/knn_untrained": curve["probe/knn_top1"],
        "reference/linear_untrained": curve["probe/linear_top1"],
        "reference/knn_pixels": pytest.approx(pixels["probe/knn_top1"]),
        "reference/linear_pixels": pytest.approx(pixels["probe/linear_top1"]),
        "reference/chance": pytest.approx(1 / 3),  # of three classes: 60 images have room for no more
    }
    assert _job(None).evaluate_untrained(model, rank=0, num_workers=1) == {}


def test_shares_of_three_workers_are_those_of_one(shards, monkeypatch):
    source = open_source(shards("set", LABELS))
    job = _job(choose_probe(OnlineProbeConfig(images=50, k=5), source, source))
    torch.manual_seed(0)
    model = job.build_model()
    whole = job.evaluate(model, rank=0, num_workers=1)
    shares: dict[int, object] = {}

    def gather(into: list, share: object) -> None:
        shares[len(shares)] = share
        into[:] = [shares.get(rank, share) for rank in range(3)]

    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    for rank in range(3):
        metrics = job.evaluate(model, rank=rank, num_workers=3)
    assert {**metrics, "perf/probe_s": 0} == {**whole, "perf/probe_s": 0}


def test_a_failure_is_said_by_all_and_ends_nothing(shards, monkeypatch):
    source = open_source(shards("set", LABELS))
    job = _job(choose_probe(OnlineProbeConfig(images=50, k=5), source, source))
    model = job.build_model()
    nn.init.constant_(model.encoder.norm.weight, float("nan"))
    with pytest.raises(EvaluationSkipped, match=r"no probe .*not finite"):
        job.evaluate(model, rank=0, num_workers=1)
    # One worker cannot read its images; the other must hear of it and not wait.
    monkeypatch.setattr(module, "_decoded", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr(
        module.dist, "all_gather_object", lambda into, share: into.__setitem__(slice(None), [share] * 2)
    )
    with pytest.raises(EvaluationSkipped, match="OSError: no route"):
        job.evaluate(model, rank=0, num_workers=2)


def test_which_images(shards, capsys):
    config = OnlineProbeConfig(images=40, k=5)
    train, few = open_source(shards("set", LABELS)), open_source(shards("few", LABELS[:8]))
    assert choose_probe(config, few, train).source is train  # type: ignore[union-attr]
    assert "few" not in capsys.readouterr().out
    assert choose_probe(config, train, few).source is train  # type: ignore[union-attr]
    assert "30 images of 2 classes of set/train (chance level: 50.0%)" in capsys.readouterr().out
    none = open_source(shards("none", None))
    assert choose_probe(config, none, none) is None
    assert "no probe" in capsys.readouterr().out
    assert choose_probe(OnlineProbeConfig(images=40, k=20), few, few) is None
    assert "only 4 images" in capsys.readouterr().out
    assert choose_probe(OnlineProbeConfig(images=0), train, train) is None
    assert capsys.readouterr().out == ""
