"""The folder of a run: its parts, and what is loaded from it."""

from __future__ import annotations

import json

import pytest

from mixmae.training.run_folder import PLAN_FILE, RunFolder, run_around, weights_of


def test_a_record_is_read_as_it_was_written_and_in_todays_words(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.read() is None
    folder.write({"status": "running", "config": {"loop": {"panel_every_epochs": 2.0}}})
    assert folder.read() == {"status": "running", "config": {"loop": {"evaluate_every_epochs": 2.0}}}
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_a_plan_may_be_there_before(tmp_path):
    (tmp_path / PLAN_FILE).write_text("{}")
    assert RunFolder(tmp_path).read() is None


def test_folders_of_something_else_and_damaged_records_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run of this program"):
        RunFolder(tmp_path).read()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).read()


def test_the_ledger_has_each_row_once(tmp_path):
    folder = RunFolder(tmp_path)
    entries = [{"row": row, "where": f"{row}.jpg", "reason": "truncated"} for row in (3, 1, 3)]
    assert [entry["row"] for entry in folder.add_broken(entries)] == [3, 1]
    assert [entry["row"] for entry in folder.add_broken([*entries, {"row": 2, "where": "", "reason": ""}])] == [2]
    assert [entry["row"] for entry in folder.broken()] == [3, 1, 2]


def test_the_last_panel_is_the_newest(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.last_panel() is None
    for step in (2, 10):
        (folder.path / "panels").mkdir(exist_ok=True)
        (folder.path / "panels" / f"step_{step:07d}.png").write_bytes(b"png")
    assert folder.last_panel() == tmp_path / "panels" / "step_0000010.png"


def test_what_to_load_of_a_run(tmp_path):
    run = tmp_path / "run"
    assert weights_of(run) == run  # not a run: a file, or a folder of weights
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="without a checkpoint"):
        weights_of(run)
    for step in (9, 10):
        (run / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
    last = run / "checkpoints" / "step_0000010"
    assert weights_of(run) == last
    assert weights_of(last) == last
    assert run_around(last) == run
    assert run_around(tmp_path) is None
    (run / "best").mkdir()
    (run / "best" / "state.json").write_text(json.dumps({}))
    assert weights_of(run) == run / "best"


def test_an_evaluation_of_a_step_that_was_trained_again_replaces_the_first(tmp_path):
    folder = RunFolder(tmp_path)
    for step, value in ((0, 0.1), (20, 0.2), (10, 0.15)):  # stopped after 20, continued from 5
        folder.add_evaluation({"step": step, "x": value})
    assert RunFolder(tmp_path).add_evaluation({"step": 20, "x": 0.25}) == [
        {"step": 0, "x": 0.1},
        {"step": 10, "x": 0.15},
        {"step": 20, "x": 0.25},
    ]


def test_what_is_put_aside_has_the_pictures_that_its_journal_names(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "panels").mkdir()
    for step in (10, 20):
        (tmp_path / "panels" / f"step_{step:07d}.png").write_bytes(b"png")
    for name in ("metrics.jsonl", "metrics.refused.jsonl", "probe.png"):
        (tmp_path / name).write_text("")
    assert folder.left == []
    aside = folder.put_aside(10)
    assert folder.left == [aside]
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()) == [
        "metrics.jsonl",
        "metrics.refused.jsonl",
        "panels/step_0000010.png",
        "panels/step_0000020.png",
        "probe.png",
    ]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png") if aside not in path.parents) == [
        "panels/step_0000010.png",
        "probe.png",
    ]
