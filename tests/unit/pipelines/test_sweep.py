"""What a user can get wrong in a sweep, and what is made of its trials."""

from __future__ import annotations

import csv
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mixmae.tracking import RunRef
from pipelines import sweep as module
from pipelines.sweep import main
from pipelines.sweeping.progress import Progress
from pipelines.sweeping.results import (
    TrialResult,
    draw_curves,
    draw_heat_map,
    label,
    print_table,
    rank,
    rows_of,
    write_csv,
    write_note,
)


def result(trial: str, decay: float, drop: float, top1: float | None, status: str = "finished") -> TrialResult:
    return TrialResult(
        trial=trial,
        values={"optim.layer_decay": decay, "encoder.drop_path": drop},
        status=status,  # type: ignore[arg-type]
        metrics={} if top1 is None else {"final/top1": top1, "final/loss": 1 - top1, "best/top1": top1},
        run_id=f"run of {trial}",
    )


RESULTS = [
    result("a", 0.7, 0.0, 0.2),
    result("b", 0.7, 0.1, None, "stopped"),
    result("c", 0.8, 0.0, 0.9, "halted"),
    result("d", 0.8, 0.1, 0.5),
]


class TestResults:
    def test_finished_trials_come_first_and_the_best_of_them_on_top(self):
        assert [item.trial for item in rank(RESULTS, "final/top1", "max")] == ["d", "a", "c", "b"]
        assert [item.trial for item in rank(RESULTS, "final/top1", "min")] == ["a", "d", "c", "b"]

    def test_a_result_that_is_no_number_is_no_result(self):
        broken = result("e", 0.9, 0.0, float("nan"))
        assert [item.trial for item in rank([broken, *RESULTS], "final/top1", "max")][-2:] == ["b", "e"]

    def test_the_table_has_every_trial_with_the_same_columns(self, tmp_path):
        rows = rows_of(rank(RESULTS, "final/top1", "max"))
        write_csv(rows, tmp_path / "results.csv")
        with (tmp_path / "results.csv").open() as file:
            read = list(csv.DictReader(file))
        assert [row["rank"] for row in read] == ["1", "2", "", ""]
        assert [row["final/top1"] for row in read] == ["0.5", "0.2", "0.9", ""]
        assert [row["optim.layer_decay"] for row in read] == ["0.8", "0.7", "0.8", "0.7"]
        assert read[0]["run_id"] == "run of d"

    def test_label(self):
        assert label({"optim.layer_decay": 0.75, "mixup.mixup": 0.0, "loop.precision": "float32"}) == (
            "layer_decay 0.75, mixup 0, precision float32"
        )

    def test_the_note_names_the_best_and_links_to_every_trial_in_order(self):
        parent = RunRef(uri="http://x", experiment_id="7", run_id="p")
        note = write_note(rank(RESULTS, "final/top1", "max"), "final/top1", parent, {"all": "#/all"})
        (best, links), table = note.split("\n\n")[0].split("  \n"), note.split("\n\n")[1]
        assert best.startswith("**Best: [layer_decay 0.8, drop_path 0.1](#/experiments/7/runs/run of d?")
        assert best.endswith("final/top1 50.00%**")
        assert links == "[all](#/all)"
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert rows[0] == ["", "layer_decay", "drop_path", "final/top1", "best/top1", "run"]
        assert [row[0] for row in rows[2:]] == ["1", "2", "halted", "stopped"]
        assert [row[3] for row in rows[2:]] == ["50.00%", "20.00%", "90.00%", ""]
        assert "/runs/run of b?" in rows[5][5]
        assert write_note(RESULTS[1:3], "final/top1", parent, {}).startswith("**No trial finished.**")

    def test_trials_of_pretraining_have_columns_of_their_own(self, capsys):
        metrics = {"final/loss": 0.5, "final/heldout_loss": 0.625, "final/knn_top1": 0.25, "final/linear_top1": 0.75}
        trial = TrialResult(trial="a", values={"method.num_images": 2}, status="finished", metrics=metrics, run_id="r")
        note = write_note([trial], "final/linear_top1", RunRef(uri="http://x", experiment_id="7", run_id="p"), {})
        head, _, row = (line.split(" | ") for line in note.splitlines()[-3:])
        assert head == ["| ", "num_images", "final/linear_top1", "run |"]
        assert row[:3] == ["| 1", "2", "75.00%"]
        print_table([trial])
        table = capsys.readouterr().out
        assert "top-5" not in table
        for text in ("held-out loss", "0.6250", "kNN top-1", "25.00%", "linear top-1", "75.00%"):
            assert text in table

    def test_the_heat_map_shows_each_trial_in_its_cell(self, tmp_path):
        """Only finished ones have a colour, the better one the brighter; white is nothing."""
        draw_heat_map(RESULTS, "final/top1", tmp_path / "map.png")
        pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
        height, width = pixels.shape[:2]
        # Beside the cells' middles, where the numbers are: decay 0.7 above, drop path 0 on the left.
        above, below, left, right = int(0.2 * height), int(0.6 * height), int(0.2 * width), int(0.55 * width)
        dark, bright = pixels[above, left], pixels[below, right]
        assert bright.sum() > 2 * dark.sum()
        assert bright[1] > bright[2]  # yellow
        assert (pixels[above, right] == 255).all()
        assert (pixels[below, left] == 255).all()

    def test_a_heat_map_over_values_of_several_kinds(self, tmp_path):
        values = [
            {"optim.layer_decay": decay, "method.fill": fill} for decay in (None, 0.7, 10.0) for fill in ("a", "b")
        ]
        trials = [replace(RESULTS[0], trial=str(number), values=point) for number, point in enumerate(values)]
        draw_heat_map(trials, "final/top1", tmp_path / "map.png")
        assert Image.open(tmp_path / "map.png").size[0] > 100

    def test_curves_of_trials_with_and_without_points(self, tmp_path):
        ranked = rank(RESULTS, "final/top1", "max")
        draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)]}, "val/top1", tmp_path / "one.png")
        draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)], "a": [(1, 0.3)]}, "val/top1", tmp_path / "two.png")
        assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


@dataclass
class Trial:
    """As much of Tune's trial as is shown."""

    trial_id: str
    config: dict
    status: str = "PENDING"


class TestProgress:
    TRIALS = tuple(Trial(item.trial, {"values": item.values}) for item in RESULTS)

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


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["demoo"], "There is no space 'demoo': did you mean demo"),
            (["demo", "--trials", "4"], "a grid has its own 6 trials"),
            (["wide", "--trials", "0"], "no trial"),
            (["demo", "--hours", "0"], "the budget is 0.0 hours"),
            (["demo", "--max-concurrent", "0"], "--max-concurrent is 0"),
            (["demo", "--optim.layer-decay", "0.6"], "optim.layer_decay varies in the space demo"),
            (["demo", "--workers-per-trial", "3"], "cannot be shared equally by 3 workers"),
            (["demo", "--pretrained", "nowhere"], "nowhere"),
            (["demo_pretrain", "--pretrained", "nowhere"], "leave out --pretrained"),
            (["demo_pretrain", "--register-model", "name"], "leave out --pretrained and --register-model"),
            (["demo_pretrain", "--probe.images", "0"], "--probe.images cannot be 0"),
            (["demo_pretrain", "--loop.batch-size", "18"], "A batch of 18 images cannot be mixed 4 at a time"),
            (["demo_pretrain", "--workers-per-trial", "8"], "sees 2 images at once, which cannot be mixed 4 at a time"),
        ],
    )
    def test_one_sentence(self, argv, message, capsys):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code in (1, 2)
        text = capsys.readouterr().err
        assert message in text
        assert "Traceback" not in text

    @pytest.mark.parametrize(("space", "metric"), [("demo", "probe/knn_top1"), ("demo_pretrain", "val/top1")])
    def test_a_metric_that_the_trials_do_not_have(self, space, metric, capsys, monkeypatch):
        monkeypatch.setitem(module.SPACES, space, replace(module.SPACES[space], metric=metric))
        with pytest.raises(SystemExit):
            main([space])
        assert f"the space ranks by {metric}, which demo" in capsys.readouterr().err

    def test_pretraining_without_labels_cannot_be_judged(self, tmp_path, capsys):
        for number in range(20):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        with pytest.raises(SystemExit):
            main(["demo_pretrain", "--data", str(tmp_path), "--output", str(tmp_path / "runs" / "sweep")])
        assert "the trials cannot be judged on" in capsys.readouterr().err

    def test_optuna_is_asked_for_where_it_is_missing(self, monkeypatch, capsys):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            main(["wide_optuna"])
        assert "pip install 'mixmae[sweep]'" in capsys.readouterr().err
