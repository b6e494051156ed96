"""The comparison of ways to pretrain: its table, what it does not do twice, and what users get wrong."""

from __future__ import annotations

import pytest
import torch

from pipelines import compare


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The command's single thread is not for the tests after it."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_mistakes(error, shards, tmp_path):
    common = ("--output", tmp_path / "out", "--data", shards("set", None))
    assert "There is no arm 'none'" in error(compare.main, *common, "--only", "none")
    assert "has no labels" in error(compare.main, *common)
    assert "takes a MixMAE recipe" in error(compare.main, *common, "--recipe", "mae_vit_base_1600ep")


def test_an_arm_is_judged_once(shards, tmp_path, monkeypatch, capsys):
    data = shards("set", [row % 4 for row in range(60)], [row % 4 for row in range(20)])
    arguments = ["--data", str(data), "--output", str(tmp_path / "out"), "--only", "untrained", "--seeds", "1"]
    assert compare.main(arguments) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[2].startswith("| untrained | 0 | ")
    monkeypatch.delattr(compare, "judge")
    assert compare.main(arguments) == 0
    assert (tmp_path / "out" / "table.md").read_text() == table


def results(arm: str, knn: tuple[float, ...], probe: float = 0.5) -> list[compare.Result]:
    """One per seed; the probe is 0.01 better with each seed."""
    return [
        compare.Result(arm=arm, seed=seed, steps=10, seconds=1.0, loss=0.5, knn=value, probe=probe + 0.01 * seed)
        for seed, value in enumerate(knn)
    ]


def test_a_summary_has_mean_and_std_over_seeds_and_the_untrained_encoder_first():
    lines = compare.summary(results("a", (0.1, 0.2, 0.3)) + results("untrained", (0.1,))).splitlines()
    assert lines[2] == "| untrained | 10 | 10.0 | 50.0 |"
    assert lines[3] == "| a | 10 | 20.0 ± 10.0 | 51.0 ± 1.0 |"


@pytest.mark.parametrize(
    ("knn", "expected"),
    [
        ((0.27, 0.28, 0.29), "kNN above by 8.0 points (standard error 0.8)"),  # (0.01**2 / 3 + 0.01**2 / 3) ** 0.5
        ((0.11, 0.12, 0.13), "kNN below by 8.0 points (standard error 0.8)"),
        ((0.17, 0.20, 0.26), "kNN +1.0 points, no difference can be told (standard error 2.7)"),
        ((0.216, 0.226, 0.236), "kNN above by 2.6 points (standard error 0.8)"),  # 3.2 standard errors
        ((0.212, 0.222, 0.232), "kNN +2.2 points, no difference can be told (standard error 0.8)"),  # 2.7
        ((0.30,), "kNN +10.0 points, but one seed cannot tell"),
        ((0.20, 0.20, 0.20), "kNN +0.0 points, no difference can be told (standard error 0.6)"),
    ],
)
def test_a_verdict_follows_from_means_and_stds(knn, expected):
    text = compare.verdict(results("untrained", (0.19, 0.20, 0.21)) + results("a", knn))
    assert "counts from 3 of its standard errors on" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- ")]
    assert line.startswith(f"- a: {expected}; linear probe ")


@pytest.mark.parametrize("arm", ["a", "untrained"])
def test_one_arm_alone_has_no_verdict(arm):
    assert "it takes the arm 'untrained' and another one" in compare.verdict(results(arm, (0.1, 0.2)))
