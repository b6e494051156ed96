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


def test_a_summary_has_mean_and_std_over_seeds():
    results = [
        compare.Result(arm="a", seed=seed, steps=10, seconds=1.0, loss=0.5, knn=knn, probe=0.5)
        for seed, knn in enumerate((0.1, 0.2, 0.3))
    ]
    assert compare.summary(results).splitlines()[2] == "| a | 10 | 20.0 ± 10.0 | 50.0 ± 0.0 |"
