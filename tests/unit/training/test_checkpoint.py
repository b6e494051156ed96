"""Checkpoints are whole, load bit for bit, and refuse another model."""

import json

import pytest
import torch
from torch import nn

from mixmae.training import checkpoint as checkpoints
from mixmae.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    step_of,
    verify,
)
from mixmae.training.ema import WeightAverage
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.run_folder import weights_of


def _trained(seed: int = 0, width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, width)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.randn(2, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_round_trip_is_bitwise(tmp_path):
    model, optimizer = _trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"step": 7})
    other, other_optimizer = _trained(seed=1)
    assert load_checkpoint(tmp_path / "c", model=other, optimizer=other_optimizer) == {"step": 7}
    assert torch.equal(model.weight, other.weight)
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_optimizer.state_dict()["state"][0][key]))


def test_the_average_of_the_weights_comes_along(tmp_path):
    model, optimizer = _trained()
    average = WeightAverage(model, 0.9)
    average.update(_trained(seed=1)[0])
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, average=average, state={})
    other = WeightAverage(_trained(seed=2)[0], 0.9)
    load_checkpoint(tmp_path / "c", model=model, average=other)
    with other.applied_to(model):
        weight = model.weight.clone()
    with average.applied_to(model):
        assert torch.equal(model.weight, weight)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={})
    with pytest.raises(CheckpointError, match=r"no average\.pt"):
        load_checkpoint(tmp_path / "c", model=model, average=other)


def test_another_model_is_refused_by_name_and_shape(tmp_path):
    model, optimizer = _trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={})
    with pytest.raises(CheckpointError, match=r"another model.*bias is \(4,\) there and \(5,\) here"):
        load_checkpoint(tmp_path / "c", model=_trained(width=5)[0])
    with pytest.raises(CheckpointError, match="2 unexpected, first bias"):
        load_checkpoint(tmp_path / "c", model=nn.Sequential(nn.Linear(3, 4)))


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    model, optimizer = _trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"step": 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert read_state(tmp_path / "c") == {"step": 1}


def test_damage_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no state\.json"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_checkpoint(tmp_path, model=_trained()[0])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "missing"])
def test_every_damage_is_noticed(tmp_path, name, damage):
    model, optimizer = _trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"position": {"step": 7}, "note": "x" * 50})
    verify(tmp_path / "c")
    file = tmp_path / "c" / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "a bit":
        for at in (len(data) // 3, len(data) // 2, len(data) - 20):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(DamagedCheckpoint):
                verify(tmp_path / "c")
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(DamagedCheckpoint):
        verify(tmp_path / "c")
    if damage != "a bit":
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_checkpoints_of_earlier_versions_have_no_digests(tmp_path):
    model, optimizer = _trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"step": 7})
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps({"step": state["step"]}))
    verify(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer) == {"step": 7}


def test_the_newest_first_and_nothing_half_written(tmp_path):
    for name in (
        "step_0000009",
        "step_0000010",
        ".partial.7.step_0000011",
        "step_x",
        "checkpoint_manager_snapshot.json",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_10000000").mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10_000_000, 10, 9]
    assert list_checkpoints(tmp_path / "none") == []


def test_a_folder_whose_writer_died_while_replacing_it_comes_back(tmp_path):
    model, _ = _trained()
    save_checkpoint(tmp_path / "best", model=model, optimizer=None, state={"step": 1})
    (tmp_path / "best").rename(tmp_path / ".previous.best")  # killed between the two renames
    (tmp_path / "run.json").write_text("{}")
    assert weights_of(tmp_path) == tmp_path / "best"
    assert read_state(tmp_path / "best") == {"step": 1}
