"""A step that was not finite is kept, and replay.py finds where it breaks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mixmae.step import StepOutput
from mixmae.training.checkpoint import CheckpointError
from mixmae.training.diverged import replay, write_diverged
from mixmae.training.loop import Diverged
from pipelines import replay as command


@dataclass
class Batch:
    images: Tensor
    rows: Tensor
    broken: tuple = ()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images).exp()).square().mean()


class Job:
    loop = SimpleNamespace(seed=3)

    def build_model(self) -> nn.Module:
        return Net()

    def describe(self) -> dict:
        return {"config": {}}

    def step(self, model, batch, generator, first_sample) -> StepOutput:
        return StepOutput(loss=model(batch.images))


def keep(folder, images: Tensor, weight: float = 1.0) -> None:
    torch.manual_seed(0)
    model = Net()
    nn.init.constant_(model.first.weight, weight)
    bad = Diverged(4, 7, Batch(images, torch.arange(len(images))), 0)
    write_diverged(folder, job=Job(), model=model, bad=bad)


def test_where_it_breaks(tmp_path, capsys):
    keep(tmp_path / "rank0", torch.tensor([[1.0, 2.0], [100.0, 1.0]]))  # exp(101) is infinite in float32
    loss, found = replay(tmp_path / "rank0")
    assert not loss < float("inf")
    assert found[:3] == ["output of second (Linear)", "output of the model (Net)", "the loss"]
    assert command.main([str(tmp_path / "rank0")]) == 1
    printed = capsys.readouterr().out
    assert "rows of the batch: 0, 1" in printed
    assert "output of second (Linear)" in printed


def test_a_step_that_is_finite_here(tmp_path, capsys):
    keep(tmp_path / "rank0", torch.tensor([[1.0, 2.0]]), weight=0.1)
    assert command.main([str(tmp_path / "rank0")]) == 0
    assert "Everything is finite here" in capsys.readouterr().out


def test_another_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no step that was kept"):
        replay(tmp_path)
