"""The journal: a file that loses nothing, says nothing twice, and needs nobody."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mixmae.tracking import Journal, JournalTracker, Reader, RunRef, backlog, points, run_of, unsent
from mixmae.tracking.journal import JOURNAL, SENT, Sent, read_sent

RUN = RunRef(uri="http://there", experiment_id="1", run_id="2")


def test_points_are_there_once_and_in_order_after_a_restart(tmp_path):
    """A run that logged steps 10 to 50 continues from the checkpoint of step 30."""
    for steps in ((10, 20, 30, 40, 50), (40, 50, 60)):
        journal = Journal(tmp_path)
        for step in steps:
            journal.add_points({"train/loss": 1 / step, "perf/images_per_s": float(len(steps))}, step)
            if step == 50:  # an evaluation of the same step is another point
                journal.add_points({"val/top1": 0.5}, step)
    assert points(tmp_path, "train/loss") == [(step, 1 / step) for step in (10, 20, 30, 40, 50, 60)]
    assert points(tmp_path, "perf/images_per_s")[3:] == [(40, 5.0), (50, 5.0), (60, 3.0)]
    assert points(tmp_path, "val/top1") == [(50, 0.5)]
    assert backlog(tmp_path) == 6 + 6 + 1


def test_the_backlog_is_what_comes_after_the_offset(tmp_path):
    assert backlog(tmp_path) == 0
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.add_points({"a": 0.0, "b": math.nan}, step)
    ends = [end for _, end in Reader(tmp_path).read()]
    Sent(uri=RUN.uri, run=RUN, offset=ends[1]).write(tmp_path)
    assert (backlog(tmp_path), run_of(tmp_path)) == (2, RUN)
    journal.add_points({"a": 0.0}, 2)  # a repeated step
    assert backlog(tmp_path) == 2
    journal.add(status="FINISHED")
    assert [entry.get("status") for entry in unsent(tmp_path)] == [None, "FINISHED"]


@pytest.mark.parametrize("content", ["", "{", '{"uri": "x"}', "[]", "null"])
def test_a_damaged_note_of_what_was_sent_is_that_of_nothing(tmp_path, content):
    (tmp_path / SENT).write_text(content)
    assert read_sent(tmp_path) == Sent()


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_left_out(tmp_path):
    """A killed process leaves the first, a bad disk the second."""
    journal = Journal(tmp_path)
    journal.add_points({"a": 1.0}, 1)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole + b'{"step": 2, "metr')
    reader = Reader(tmp_path)
    assert [entry["step"] for entry, _ in reader.read()] == [1]
    journal.add_points({"a": 3.0}, 3)
    assert [entry["step"] for entry, _ in reader.read()] == [3]  # the same reader goes on
    damaged = b'{"step": "x", "metrics": {"a": 1}}\n7\nnull\n\xff\xfe\n{"step": 4, "metrics": 5}\n'
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(damaged)
    journal.add_points({"a": 5.0}, 5)
    assert points(tmp_path, "a") == [(1, 1.0), (3, 3.0), (5, 5.0)]


def test_what_cannot_be_written_is_written_later(tmp_path):
    """The folder is away for a while, as a network file system may be."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    journal = Journal(folder)
    journal.add_points({"a": 0.0}, 1)
    folder.rename(elsewhere)
    with pytest.warns(UserWarning, match="cannot be written"):
        journal.add_points({"a": 0.0}, 2)
    journal.add_points({"a": 0.0}, 3)
    journal.sync()
    elsewhere.rename(folder)
    journal.add_points({"a": 0.0}, 4)
    assert [step for step, _ in points(folder, "a")] == [1, 2, 3, 4]


def test_the_tracker_of_rank_0_needs_nobody(tmp_path):
    """It cannot wait for MLflow, as it does not even load it; nor does a full disk stop it."""
    code = f"""
import sys
from pathlib import Path
from PIL import Image
from mixmae.tracking import JournalTracker
tracker = JournalTracker(Path({str(tmp_path)!r}), system_metrics=False)
tracker.log_metrics({{"train/loss": 1.0}}, 1)
tracker.log_panel(Image.new("RGB", (2, 2)), 1)
tracker.sync()
tracker.close()
print({{"mlflow", "requests", "sqlite3"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert lines[0]["metrics"] == {"train/loss": 1.0}
    assert lines[1]["image"] == "panels/step_0000001.png"
    shutil.rmtree(tmp_path / "panels")
    (tmp_path / "panels").write_text("in the way")
    tracker = JournalTracker(tmp_path, system_metrics=False)
    with pytest.warns(UserWarning, match="step_0000002.png cannot be written"):
        tracker.log_panel(Image.new("RGB", (2, 2)), 2)
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 2


@pytest.mark.timeout(120)
def test_system_metrics_go_on_after_a_restart(tmp_path, monkeypatch):
    """They know of no store, so no outage ends them."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    name = "system/cpu_utilization_percentage"
    for enough in (2, 5):
        tracker = JournalTracker(tmp_path)
        while len(points(tmp_path, name)) < enough:
            tracker._closed.wait(0.1)
        tracker.close()
    assert [step for step, _ in points(tmp_path, name)] == list(range(len(points(tmp_path, name))))
    assert Path(tmp_path / JOURNAL).is_file()
