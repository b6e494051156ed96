"""Checkpoints that are written by a thread while training goes on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from mixmae.training import saving
from mixmae.training.checkpoint import list_checkpoints, load_checkpoint, verify
from mixmae.training.ema import WeightAverage
from mixmae.training.saving import CheckpointWriter


def made() -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), WeightAverage(model, 0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage) -> None:
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(model)


def save(writer: CheckpointWriter, step: int, parts: tuple) -> float:
    model, optimizer, average = parts
    return writer.save(step=step, model=model, optimizer=optimizer, average=average, state={"position": {"step": step}})


def test_it_holds_what_the_weights_were_when_it_was_asked_for(tmp_path, monkeypatch):
    """Training goes on, and changes everything in place, before the first byte is written."""
    may_write = threading.Event()
    honest = saving.write_parts

    def late(*arguments):
        assert may_write.wait(10)
        honest(*arguments)

    monkeypatch.setattr(saving, "write_parts", late)
    parts = made()
    train(*parts)
    expected = [{key: value.clone() for key, value in parts[0].state_dict().items()}]
    moments = [state["exp_avg"].clone() for state in parts[1].state.values()]
    averages = {key: value.clone() for key, value in parts[2].state_dict()["averages"].items()}
    writer = CheckpointWriter(tmp_path, keep=None)
    writer.reserve(*parts)
    save(writer, 1, parts)
    for _ in range(3):
        train(*parts)
    may_write.set()
    assert writer.wait() == tmp_path / "step_0000001"
    model, optimizer, average = made()
    train(model, optimizer, average)
    load_checkpoint(tmp_path / "step_0000001", model=model, optimizer=optimizer, average=average)
    assert all(torch.equal(value, expected[0][key]) for key, value in model.state_dict().items())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert all(torch.equal(v, averages[k]) for k, v in average.state_dict()["averages"].items())


def test_the_memory_of_the_copies_is_used_again(tmp_path):
    parts = made()
    train(*parts)
    writer = CheckpointWriter(tmp_path, keep=None)
    save(writer, 1, parts)
    first = {name: copy.data_ptr() for name, copy in writer._copies.items()}
    train(*parts)
    save(writer, 2, parts)
    assert {name: copy.data_ptr() for name, copy in writer._copies.items()} == first
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000002", "step_0000001"]


def test_the_newest_stay(tmp_path):
    parts = made()
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in range(9, 13):
        save(writer, step, parts)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000011", "step_0000012"]
    for path in list_checkpoints(tmp_path):
        verify(path)


def test_what_cannot_be_written_is_said_and_the_older_ones_stay(tmp_path, monkeypatch):
    said: list[str] = []
    parts = made()
    writer = CheckpointWriter(tmp_path, keep=1, report=said.append)
    save(writer, 1, parts)
    writer.wait()
    honest = saving.write_parts

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_parts", full_disk)
    save(writer, 2, parts)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert said == [
        "the checkpoint of step 2 could not be written ([Errno 28] No space left on device); training goes on"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]
    monkeypatch.setattr(saving, "write_parts", honest)
    save(writer, 3, parts)
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]


def test_a_folder_that_somebody_else_has_taken_over_is_left_alone(tmp_path):
    said: list[str] = []
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1, may_write=lambda: False, report=said.append)
    save(writer, 1, made())
    with pytest.raises(OSError, match="another process has taken over"):
        writer.wait()
    assert not (tmp_path / "checkpoints").exists()
