"""The validation of a classifier: its workers' parts, and models that have diverged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixmae.data.blocks import eval_batch, eval_batches
from mixmae.data.source import DataError, Source
from mixmae.data.sources import open_source
from mixmae.jobs import classification
from mixmae.jobs.classification import ClassificationJob
from mixmae.metrics import top_k_accuracy
from mixmae.probing.features import predict_logits
from mixmae.training.failures import TrainingStopped
from pipelines.recipes import FINETUNE_RECIPES


def _job(folder: Path, source: Source) -> ClassificationJob:
    config = FINETUNE_RECIPES["demo_finetune"]()
    return ClassificationJob.of(config, source, source, data=None, folder=folder, pretrained=None)


def test_shares_of_the_validation_set_add_up_to_the_whole(tmp_path, shards, monkeypatch):
    """Three workers on 13 images, one of them without a class, against one worker and the metrics."""
    folder = shards("set", [*[row % 4 for row in range(12)], -1])
    source = open_source(folder)
    job = _job(tmp_path, source)
    config = job.config
    torch.manual_seed(0)
    model = job.build_model()
    torch.nn.init.normal_(model.head.weight)
    batches = eval_batches(source, config.augment.image_size, batch_size=5)
    logits, labels = predict_logits(model, batches, mean=config.pixel_mean, std=config.pixel_std)
    expected = top_k_accuracy(logits, labels, ks=(1, 5))
    whole = job.evaluate(model, rank=0, num_workers=1)
    assert whole["val/top1"] == expected.top[1]
    assert whole["val/top5"] == expected.top[5] == 1.0
    loss = torch.nn.functional.cross_entropy(logits[:12], labels[:12]).item()
    assert whole["val/loss"] == pytest.approx(loss, rel=1e-5)

    parts: list[torch.Tensor] = []
    monkeypatch.setattr(classification.dist, "all_reduce", lambda sums: parts.append(sums.clone()))
    for rank in range(3):
        job.evaluate(model, rank=rank, num_workers=3)
    count, loss, top1, top5 = torch.stack(parts).sum(dim=0).tolist()
    assert count == 12
    assert {"val/loss": loss / 12, "val/top1": top1 / 12, "val/top5": top5 / 12} == pytest.approx(whole, rel=1e-5)


def test_a_model_that_has_diverged_is_never_right(tmp_path, shards):
    """No logit is above a NaN: without care all images would count as right, and these weights be kept as the best."""
    job = _job(tmp_path, open_source(shards("set", [row % 4 for row in range(8)])))
    model = job.build_model()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    metrics = job.evaluate(model, rank=0, num_workers=1)
    assert (metrics["val/top1"], metrics["val/top5"]) == (0, 0)


def test_broken_validation_images_are_in_no_figure_and_named(tmp_path, shards, monkeypatch):
    """The first of four workers has nothing but broken images."""
    labels = [row % 4 for row in range(12)]
    source = open_source(shards("set", labels, broken=4))
    job = _job(tmp_path, source)
    torch.manual_seed(0)
    model = job.build_model()
    torch.nn.init.normal_(model.head.weight)
    config = job.config
    images = eval_batch(source, range(12), config.augment.image_size)
    logits = model.eval()(config.normalise(images))
    expected = top_k_accuracy(logits, torch.tensor(labels[4:]))
    whole = job.evaluate(model, rank=0, num_workers=1)
    assert whole["val/top1"] == expected.top[1]
    assert [record.row for record in job.left_out(rank=0)] == [0, 1, 2, 3]

    parts: list[torch.Tensor] = []
    monkeypatch.setattr(classification.dist, "all_reduce", lambda sums: parts.append(sums.clone()) or sums.fill_(1))
    for rank in range(4):
        job.evaluate(model, rank=rank, num_workers=4)
    assert torch.stack(parts)[:, 0].tolist() == [0, 2, 3, 3]


def test_broken_images_alone(tmp_path, shards):
    whole, broken = open_source(shards("set", [0, 1] * 6)), open_source(shards("broken", [0, 1] * 6, broken=12))
    config = FINETUNE_RECIPES["demo_finetune"]()
    common = {"data": None, "folder": tmp_path, "pretrained": None}
    for pair in ((whole, broken), (broken, whole)):
        with pytest.raises(DataError, match=r"8 of 8 images of broken/train that were looked at could not be used"):
            ClassificationJob.of(config, *pair, **common)
    job = replace(_job(tmp_path, whole), validation=broken)  # they have gone after the run began
    with pytest.raises(TrainingStopped, match=r"No image of broken/train that has a class could be decoded"):
        job.evaluate(job.build_model(), rank=0, num_workers=1)
