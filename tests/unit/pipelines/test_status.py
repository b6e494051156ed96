"""status.py on folders as runs leave them: what it says, and its exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixmae.lock import LOCK_FILE, release_all, take
from mixmae.tracking import Journal
from mixmae.training import store_lock
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.progress import ProgressFile
from mixmae.training.run_store import RunStore
from mixmae.writing import write_json
from pipelines import status
from tests.s3_server import serve_s3

ROOT = Path(__file__).parents[3]
RECORD: dict[str, Any] = {
    "status": "running",
    "recipe": "demo",
    "config": {"loop": {"batch_size": 16, "max_broken_fraction": 0.01}},
    "data": {"name": "moths"},
    "mlflow": {"uri": "http://mlflow:5000", "experiment_id": "1", "run_id": "abc"},
}
PROGRESS = {"loss": 0.5, "epoch": 1.5, "images_per_s": 100.0, "data_wait_share": 0.03, "broken_images": 2, "lr": 0.1}


@pytest.fixture(autouse=True)
def give_back():
    yield
    release_all()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that was killed after its second checkpoint; written by what writes them in a run."""
    write_json(tmp_path / "run.json", RECORD)
    for step in (50, 100):
        keep_checkpoint(tmp_path, step)
    progress = ProgressFile(tmp_path, 400)
    progress.receive("started", 0)
    progress.receive("progress", {"step": 1, **PROGRESS})
    progress.receive("failed", "rank 0: RuntimeError: its neighbour is gone")
    progress.receive("restart", "rank 1: RuntimeError: no memory")
    progress.receive("started", 100)
    progress.receive("restart", "rank 0: its process died")
    progress.receive("progress", {"step": 61, **PROGRESS})
    time.sleep(0.01)
    progress.receive("progress", {"step": 101, **PROGRESS})
    (tmp_path / "broken_images.jsonl").write_text('{"row": 1}\n{"row": 2}\n{"ro')
    return tmp_path


def keep_checkpoint(run: Path, step: int, *, digests: bool = True) -> Path:
    path, model = run / "checkpoints" / f"step_{step:07d}", nn.Linear(30, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(path, model=model, optimizer=optimizer, state={"position": {"step": step}})
    if not digests:
        write_json(path / "state.json", {"position": {"step": step}})
    return path


def ask(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = status.main([str(folder), *flags])
    return code, capsys.readouterr().out


def test_a_killed_run(folder, capsys):
    code, text = ask(folder, capsys)
    assert code == 4
    assert "state       interrupted; the same command continues\n" in text
    assert "run         demo on moths\n" in text
    assert "step        101 of 400 (25%), epoch 1.50, loss 0.5000, 100 images/s, waiting for data 3%, at " in text
    assert "checkpoint  step_0000100, 0.0 MB: all files have their lengths (--verify reads the bytes)\n" in text
    assert "restarts    2\n" in text
    assert ", from step 100: rank 1: RuntimeError: no memory\n" in text
    assert ", from step 100: rank 0: its process died\n" in text
    assert "data        2 broken images replaced of 1616 seen (0.12%, 1.0% may be); 2 in broken_images.jsonl" in text
    assert "MLflow      0 points are not sent yet; http://mlflow:5000, run abc\n" in text
    assert "more checkpoints" in text
    assert "ETA" not in text


def test_how_many_workers_there_were_at_each_start(folder, capsys):
    assert "\nworkers " not in ask(folder, capsys)[1]  # a run of an earlier version
    progress = ProgressFile(folder, 400)
    for step, count in ((0, 3), (50, 1), (100, 2)):
        progress.receive("workers", {"count": count, "of": "1:3"})
        progress.receive("started", step)
    progress.receive("started", 50)  # the same workers have gone back to a checkpoint
    text = ask(folder, capsys)[1]
    assert "\nworkers     2 from step 100, since " in text
    assert "; at the starts before 3 from step 0, 1 from step 50\n" in text
    for step in (110, 120):
        progress.receive("workers", {"count": 2, "of": "1:3"})
        progress.receive("started", step)
    assert "; at the last starts before 1 from step 50, 2 from step 100, 2 from step 110\n" in ask(folder, capsys)[1]
    assert [start["workers"] for start in json.loads(ask(folder, capsys, "--json")[1])["starts"]] == [3, 1, 2, 2, 2]


def test_a_run_under_way_has_an_owner_and_an_end(folder, capsys):
    take(folder)
    code, text = ask(folder, capsys)
    assert code == 3
    assert "state       running\n" in text
    assert "heartbeat 0 s ago, since " in text
    assert "ETA         0:00:0" in text
    release_all()
    assert ask(folder, capsys)[0] == 4
    assert "owner       none; " in ask(folder, capsys)[1]


def test_an_owner_that_died(folder, capsys):
    with subprocess.Popen(
        [sys.executable, "-c", f"from mixmae.lock import take; import pathlib, os\n"
         f"take(pathlib.Path({str(folder)!r})); os.kill(os.getpid(), 9)"], cwd=ROOT,
    ) as owner:  # fmt: skip
        pass
    code, text = ask(folder, capsys)
    assert code == 4
    assert f"(process {owner.pid}) died, its last heartbeat was at " in text


def test_an_owner_elsewhere_is_believed_while_its_heartbeat_is_fresh_or_moves(folder, capsys, monkeypatch):
    monkeypatch.setattr("mixmae.lock.HEARTBEAT_S", 0.2)
    take(folder, heartbeat_s=0.1)
    content = (folder / LOCK_FILE).read_text()
    own = json.loads(content)["host"]
    release_all()
    (folder / LOCK_FILE).write_text(content.replace(f'"host": "{own}"', '"host": "elsewhere"'))
    assert ask(folder, capsys)[0] == 3
    monkeypatch.setattr("mixmae.lock.WATCH_S", 0.0)  # as if it were old
    assert ask(folder, capsys)[0] == 4


@pytest.mark.parametrize(("recorded", "code"), [("finished", 0), ("stopped", 1), ("failed", 1), ("preparing", 4)])
def test_the_record_says_how_it_ended(folder, capsys, recorded, code):
    write_json(folder / "run.json", RECORD | {"status": recorded, "reason": "the loss is not finite"})
    assert ask(folder, capsys)[0] == code
    assert f"{'interrupted' if recorded == 'preparing' else recorded}: the loss is not finite" in ask(folder, capsys)[1]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_found(folder, capsys, name, damage):
    file = folder / "checkpoints" / "step_0000100" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else file.stat().st_size // 2])
    text = ask(folder, capsys)[1]
    assert "step_0000100, 0.0 MB: DAMAGED, " in text
    assert name in text
    assert "step_0000050, 0.0 MB: all files have their lengths" in text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_one_bit_is_found_by_reading_all(folder, capsys, name):
    assert "step_0000100, 0.0 MB: verified, all bytes" in ask(folder, capsys, "--verify")[1]
    file = folder / "checkpoints" / "step_0000100" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "DAMAGED" not in ask(folder, capsys)[1]
    text = ask(folder, capsys, "--verify")[1]
    assert f"step_0000100, 0.0 MB: DAMAGED, {name} is not what was written" in text
    assert "step_0000050, 0.0 MB: verified" in text


def test_a_state_that_was_changed_is_found_at_once(folder, capsys):
    file = folder / "checkpoints" / "step_0000100" / "state.json"
    file.write_text(file.read_text().replace('"step": 100', '"step": 99'))
    assert "step_0000100, 0.0 MB: DAMAGED, state.json is not what was written" in ask(folder, capsys)[1]


def test_checkpoints_of_earlier_versions_have_no_digests(folder, capsys):
    keep_checkpoint(folder, 150, digests=False)
    for flags in ([], ["--verify"]):
        assert "step_0000150, 0.0 MB: all files have their lengths; not verifiable" in ask(folder, capsys, *flags)[1]


def test_a_disk_without_room_for_the_next_checkpoint(folder, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "NO ROOM for the next checkpoint of" in ask(folder, capsys)[1]


def test_json_has_the_same(folder, capsys):
    code, text = ask(folder, capsys, "--json")
    found = json.loads(text)
    assert found["exit_status"] == code == 4
    assert found["progress"]["step"] == 101
    assert found["progress"]["eta_s"] == pytest.approx(0.01 / 40 * 299, abs=0.5)
    assert [item["step"] for item in found["restarts"]] == [100, 100]
    assert found["checkpoints"][0]["step"] == 100
    assert found["mlflow"]["backlog"] == 0


def test_what_mlflow_refused_and_what_was_put_aside(folder, capsys):
    Journal(folder).add_points({"a=b": 1.0}, 1)
    (folder / "metrics.refused.jsonl").write_text('{"metrics": {"a=b": 1}, "step": 1, "reason": "Invalid name"}\n{"to')
    (folder / "left_0_at_step_50").mkdir()
    Journal(folder / "left_0_at_step_50").add_points({"x": 1.0, "y": 1.0}, 60)
    _, text = ask(folder, capsys)
    assert "1 entries were refused (a=b; the last: Invalid name) and are kept in metrics.refused.jsonl" in text
    assert "left_0_at_step_50: 2 points are not sent yet" in text


def test_nothing_there(tmp_path, capsys):
    for path in (tmp_path / "no folder", tmp_path):
        code, text = ask(path, capsys)
        assert code == 5
        assert "no run there" in text
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        ask(tmp_path, capsys)
    assert ended.value.code == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path, capsys):
    take(tmp_path)
    code, text = ask(tmp_path, capsys)
    assert code == 3
    assert "run         not recorded yet" in text
    assert "checkpoint  none yet" in text


def test_a_sweep_has_a_line_for_each_trial(folder, capsys):
    write_json(folder / "run.json", RECORD | {"space": {"vary": []}})
    trials = {"a1": "finished", "b2": "running", "c3": "stopped"}
    for name, recorded in trials.items():
        record = RECORD | {"status": recorded, "trial": {"optim.layer_decay": 0.7}, "metrics": {"final/top1": 0.5}}
        (folder / "trials" / name).mkdir(parents=True)
        write_json(folder / "trials" / name / "run.json", record)
    shutil.copy(folder / "progress.json", folder / "trials" / "b2")
    text = ask(folder, capsys)[1]
    assert "trial       a1 (layer_decay 0.7) finished, top1 0.5000\n" in text
    assert "trial       b2 (layer_decay 0.7) interrupted, step 101 of 400, " in text
    take(folder)
    assert "trial       b2 (layer_decay 0.7) running, " in ask(folder, capsys)[1]


def test_it_loads_nothing_slow(folder):
    code = f"""
import sys
from pipelines import status
status.main([{str(folder)!r}])
print({{"ray", "mlflow", "torch", "numpy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("set()\n")


def test_a_run_in_a_store(folder, capsys):
    with serve_s3() as server:
        place = server.uri("r")
        assert ask(Path(place), capsys) == (
            5, "output      s3://runs/r\nstate       no run there: check the path, or start one with --output s3://runs/r\n"
        )  # fmt: skip
        store = RunStore.of(place, folder.parent / "staging")
        for path in folder.glob("*.json*"):
            store.put(path, path.name)
        for path in folder.glob("checkpoints/*"):
            store.put_folder(path, f"checkpoints/{path.name}")
        code, text = ask(Path(place), capsys)
        assert code == 4
        assert "output      s3://runs/r\nstate       interrupted; the same command continues" in text
        assert "step_0000100, 0.0 MB: all files are there (--verify reads the bytes)" in text
        assert "2 in broken_images.jsonl" in text
        assert "disk " not in text
        assert "verified, all bytes are those that were written" in ask(Path(place), capsys, "--verify")[1]
        server.write("r/checkpoints/step_0000100/optimizer.pt", b"x")
        text = ask(Path(place), capsys, "--verify")[1]
        assert "step_0000100, 0.0 MB: DAMAGED" in text
        assert "step_0000050, 0.0 MB: verified" in text
        lock = store_lock.take(store, settle_s=0.1)
        assert ask(Path(place), capsys)[0] == 3
        lock.release()
        server.stop()
        with pytest.raises(SystemExit):
            ask(Path(place), capsys)
        assert "error: s3://runs/r gives no answer" in capsys.readouterr().err
