"""What a sweep prints while it runs, on a terminal and in a log."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from rich.console import Console

from pipelines.sweeping.progress import Progress


@dataclass
class Trial:
    """As much of Tune's trial as is shown."""

    trial_id: str
    config: dict
    status: str = "PENDING"


class TestProgress:
    TRIALS = tuple(
        Trial(name, {"values": {"optim.layer_decay": decay, "encoder.drop_path": drop}})
        for name, decay, drop in (("a", 0.7, 0.0), ("b", 0.7, 0.1), ("c", 0.8, 0.0), ("d", 0.8, 0.1))
    )

    def show(self, folder) -> None:
        progress = Progress(4, folder, "val/top1")
        pickle.loads(pickle.dumps(progress))  # as Tune does, to continue
        progress.on_trial_start(0, list(self.TRIALS), self.TRIALS[0])
        progress.on_trial_result(1, list(self.TRIALS), self.TRIALS[0], {"epoch": 0.5, "val/top1": 0.25})
        progress.on_experiment_end(list(self.TRIALS))

    def test_a_log_gets_a_line_for_each_event(self, tmp_path, capsys):
        self.show(tmp_path)
        assert capsys.readouterr().out.splitlines() == [
            "trial a (layer_decay 0.7, drop_path 0) starts",
            "trial a (layer_decay 0.7, drop_path 0) epoch 0.50 · val/top1 0.2500",
        ]

    def test_the_reference_has_its_name(self, tmp_path, capsys, monkeypatch):
        trials = [Trial("r", {"values": None}), self.TRIALS[0]]
        Progress(5, tmp_path, "val/top1").on_trial_start(0, trials, trials[0])
        assert capsys.readouterr().out == "trial r (from scratch) starts\n"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setattr("rich.get_console", lambda: Console(force_terminal=True, width=100))
        for shown in (trials[:1], trials):
            progress = Progress(5, tmp_path, "val/top1")
            progress.on_trial_start(0, shown, trials[0])
            progress.on_experiment_end(trials)
            assert "from scratch" in capsys.readouterr().out

    def test_a_terminal_gets_one_table_that_changes_in_place(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setattr("rich.get_console", lambda: Console(force_terminal=True, width=100))
        self.show(tmp_path)
        text = capsys.readouterr().out
        first, second = text.split("starts")
        assert "trial a" not in text
        assert first.count("pending") == 0
        assert "\x1b[1A" in second  # back up, over the table before
        last = second[second.rindex("\x1b[1A") :]
        assert last.count("pending") == 3
        assert "epoch 0.50 · val/top1 0.2500" in last
