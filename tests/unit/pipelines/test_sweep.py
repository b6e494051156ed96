"""What a user can get wrong in a sweep: one sentence, before the run starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mixmae.jobs.record import RunRecord
from pipelines import sweep as module
from pipelines.sweep import base_config, choose_reference, fixed_for_all, main
from pipelines.sweeping.trial import Arguments
from tune_spaces import SPACES


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["demoo"], "There is no space 'demoo': did you mean demo"),
            (["demo", "--trials", "4"], "a grid has its own 6 trials"),
            (["wide", "--trials", "0"], "no trial"),
            (["demo", "--hours", "0"], "the budget is 0.0 hours"),
            (["demo", "--max-concurrent", "-1"], "--max-concurrent is -1"),
            (["demo", "--optim.layer-decay", "0.6"], "optim.layer_decay varies in the space demo"),
            (["demo", "--workers-per-trial", "33"], "A batch of 32 images cannot be shared by 33 workers"),
            (["demo", "--pretrained", "nowhere"], "nowhere"),
            (["demo_pretrain", "--pretrained", "nowhere"], "leave out --pretrained"),
            (["demo_pretrain", "--register-model", "name"], "leave out --pretrained and --register-model"),
            (["demo_detect", "--register-model", "name"], "the trials of demo_detect are detectors"),
            (["demo_pretrain", "--probe.images", "0"], "--probe.images cannot be 0"),
            (["demo_pretrain", "--loop.batch-size", "18"], "A batch of 18 images cannot be mixed 4 at a time"),
            (
                ["demo_pretrain", "--workers-per-trial", "16"],
                "32 images, 8 times 4 that stay together, cannot be shared by 16 workers",
            ),
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


def test_only_a_sweep_that_was_begun_with_a_reference_goes_on_with_it():
    space = SPACES["demo"]
    config = base_config(space)
    arguments = Arguments(config=config, pretrained=Path("weights"))
    assert choose_reference(arguments, space, None) == {"optim.layer_decay": None}
    assert choose_reference(replace(arguments, pretrained=None), space, None) is None
    assert choose_reference(replace(arguments, reference=False), space, None) is None
    for reference in (None, space.reference):
        before = RunRecord(status="running", config={}, space=fixed_for_all(space, config, reference))
        assert choose_reference(arguments, space, before) == reference
