"""What is made of a sweep's trials."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
from PIL import Image

from mixmae.tracking import RunRef
from pipelines.sweeping.results import (
    Reference,
    TrialResult,
    draw_curves,
    draw_heat_map,
    heat_map_table,
    label,
    print_table,
    rank,
    rows_of,
    scores,
    verdict,
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


def test_finished_trials_come_first_and_the_best_of_them_on_top():
    assert [item.trial for item in rank(RESULTS, "final/top1", "max")] == ["d", "a", "c", "b"]
    assert [item.trial for item in rank(RESULTS, "final/top1", "min")] == ["a", "d", "c", "b"]


SCRATCH = replace(result("s", 0.75, 0.0, 0.6), is_reference=True)
REFERENCE = Reference(words="from scratch", value=0.6)


def test_the_reference_is_shown_and_never_the_best(tmp_path, capsys):
    """Here it is better than every trial, which is said."""
    ranked = rank([SCRATCH, *RESULTS], "final/top1", "max")
    assert [item.trial for item in ranked] == ["d", "a", "c", "b", "s"]
    assert [row["rank"] for row in rows_of(ranked)] == ["1", "2", "", "", "reference"]
    assert heat_map_table(ranked, "final/top1")[0] == [0.7, 0.8]  # not 0.75
    print_table(ranked)
    assert "│ reference │" in capsys.readouterr().out.splitlines()[-2]
    remarks = verdict(ranked, "final/top1", REFERENCE, 1000)
    assert remarks.startswith("No trial is better than the reference (from scratch). ")
    many = rank([SCRATCH, *(result(str(number), 0.7, 0.0, number / 100) for number in range(12))], "final/top1", "max")
    parent = RunRef(uri="http://x", experiment_id="7", run_id="p")
    note = write_note(many, "final/top1", parent, {"all": "#/all"}, REFERENCE, remarks)
    assert "final/top1 11.00%, from scratch 60.00%**" in note
    *rows, last = note.split("\n\n")[1].splitlines()
    assert len(rows) == 2 + 10  # the head and the ten best
    assert last.startswith("| reference | 0.75 | 0 | 60.00% |")
    assert note.endswith(f"\n\n{remarks}")
    draw_heat_map(ranked, "final/top1", tmp_path / "with.png", REFERENCE)
    draw_heat_map(ranked, "final/top1", tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_reference_alone_is_no_winner():
    note = write_note([SCRATCH], "final/top1", RunRef(uri="u", experiment_id="7", run_id="p"), {}, REFERENCE)
    assert note.startswith("**No trial finished.**")


def test_what_may_be_noise():
    """Of 1,000 images and a share of one half the standard error is 1.58 points, of a difference 2.24."""
    ranked = [result(str(number), 0.7, 0.0, value) for number, value in enumerate((0.5, 0.46, 0.456, 0.454))]

    def remarks(value: float, num_images: int = 1000) -> str:
        return verdict(ranked, "final/top1", Reference(words="from scratch", value=value), num_images)

    assert "Differences below 4.5 points may be noise" in remarks(0.4)
    assert "on 1,000 images" in remarks(0.4)
    assert "ranks 1 to 3 differ by less" in remarks(0.4)
    assert "reference" not in remarks(0.4)
    assert remarks(0.46).endswith("The best trial differs from the reference by less.")
    assert "ranks" not in remarks(0.4, 10_000)
    assert scores(ranked, "final/top1", Reference(words="untrained encoder", value=0.25)) == (
        "50.00%, untrained encoder 25.00%"
    )


def test_a_loss_is_compared_without_a_word_on_noise():
    ranked = [result("a", 0.7, 0.0, 0.5), result("b", 0.7, 0.1, 0.4)]
    assert verdict(ranked, "final/loss", Reference(words="from scratch", value=0.6), 1000) == ""
    better = verdict(ranked, "final/loss", Reference(words="from scratch", value=0.4), 1000)
    assert better == "No trial is better than the reference (from scratch)."


def test_a_result_that_is_no_number_is_no_result():
    broken = result("e", 0.9, 0.0, float("nan"))
    assert [item.trial for item in rank([broken, *RESULTS], "final/top1", "max")][-2:] == ["b", "e"]


def test_the_table_has_every_trial_with_the_same_columns(tmp_path):
    rows = rows_of(rank(RESULTS, "final/top1", "max"))
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["rank"] for row in read] == ["1", "2", "", ""]
    assert [row["final/top1"] for row in read] == ["0.5", "0.2", "0.9", ""]
    assert [row["optim.layer_decay"] for row in read] == ["0.8", "0.7", "0.8", "0.7"]
    assert read[0]["run_id"] == "run of d"


def test_label():
    assert label({"optim.layer_decay": 0.75, "mixup.mixup": 0.0, "loop.precision": "float32"}) == (
        "layer_decay 0.75, mixup 0, precision float32"
    )


def test_the_note_names_the_best_and_links_to_every_trial_in_order():
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


def test_trials_of_pretraining_have_columns_of_their_own(capsys):
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


def test_the_heat_map_shows_each_finished_trial_in_its_cell():
    rows, columns, table = heat_map_table(RESULTS[::-1], "final/top1")
    assert (rows, columns) == ([0.7, 0.8], [0.0, 0.1])  # decay from top to bottom, drop path from left to right
    np.testing.assert_equal(table, [[0.2, float("nan")], [float("nan"), 0.5]])


def test_a_heat_map_over_values_of_several_kinds(tmp_path):
    values = [{"optim.layer_decay": decay, "method.fill": fill} for decay in (None, 0.7, 10.0) for fill in ("a", "b")]
    trials = [replace(RESULTS[0], trial=str(number), values=point) for number, point in enumerate(values)]
    assert heat_map_table(trials, "final/top1")[:2] == ([0.7, 10.0, None], ["a", "b"])
    draw_heat_map(trials, "final/top1", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size[0] > 100


def test_curves_of_trials_with_and_without_points(tmp_path):
    ranked = rank(RESULTS, "final/top1", "max")
    draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)]}, "val/top1", tmp_path / "one.png")
    draw_curves(ranked, {"d": [(1, 0.1), (2, 0.5)], "a": [(1, 0.3)]}, "val/top1", tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
