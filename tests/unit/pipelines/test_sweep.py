"""What a user can get wrong in a sweep, and what is made of its trials."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from pipelines import sweep as module
from pipelines.sweep import main
from pipelines.sweep_results import TrialResult, draw_curves, draw_heat_map, label, rank, rows_of, write_csv


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

    def test_curves_of_trials_with_and_without_points(self, tmp_path):
        ranked = rank(RESULTS, "final/top1", "max")
        draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)]}, "val/top1", tmp_path / "one.png")
        draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)], "a": [(1, 0.3)]}, "val/top1", tmp_path / "two.png")
        assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Any attempt to start Ray or MLflow fails the test: these errors must come first."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached the cluster")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "connect", refuse)
    monkeypatch.setattr(module, "create_run", refuse)


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
        ],
    )
    def test_one_sentence(self, argv, message, capsys):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code in (1, 2)
        text = capsys.readouterr().err
        assert message in text
        assert "Traceback" not in text

    def test_optuna_is_asked_for_where_it_is_missing(self, monkeypatch, capsys):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            main(["wide_optuna"])
        assert "pip install 'mixmae[sweep]'" in capsys.readouterr().err
