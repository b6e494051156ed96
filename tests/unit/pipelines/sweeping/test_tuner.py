"""What a sweep of an earlier version needs to be continued, and who leaves the reference alone."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
from ray import tune

from pipelines.sweeping.progress import Progress
from pipelines.sweeping.tuner import AshaOfTrials, OptunaOfTrials, know_former_modules


def test_pickles_of_earlier_versions_are_understood():
    """Tune keeps the callback that reports progress by the name of its module."""
    know_former_modules()
    assert pickle.loads(b"cpipelines.sweep_progress\nProgress\n.") is Progress


@dataclass
class Trial:
    """As much of Tune's trial as its schedulers read."""

    trial_id: str
    config: dict = field(default_factory=lambda: {"values": {"optim.layer_decay": 0.7}})


def test_asha_stops_the_worse_trial_and_never_the_reference():
    asha = AshaOfTrials(time_attr="epoch", metric="val/top1", mode="max", max_t=9, grace_period=1, reduction_factor=2)
    reference, first, second, third = Trial("r", {"values": None}), Trial("a"), Trial("b"), Trial("c")
    for trial in (reference, first, second, third):
        asha.on_trial_add(None, trial)

    def decide(trial: Trial, top1: float) -> str:
        return asha.on_trial_result(None, trial, {"epoch": 1, "val/top1": top1})

    assert decide(first, 0.5) == "CONTINUE"
    assert decide(reference, 0.1) == "CONTINUE"
    asha.on_trial_complete(None, reference, {"epoch": 1, "val/top1": 0.9})
    assert decide(second, 0.6) == "CONTINUE"  # which is worse than the reference, but that does not count
    assert decide(third, 0.2) == "STOP"


def test_optuna_learns_nothing_from_the_reference(tmp_path):
    pytest.importorskip("optuna")

    def search(*, reference: bool) -> OptunaOfTrials:
        made = OptunaOfTrials(reference=reference, metric="val/top1", mode="max", seed=3)
        made.set_search_properties(None, None, {"values": {"optim.base_lr": tune.uniform(0.0, 1.0)}})
        return made

    with_it, without = search(reference=True), search(reference=False)
    assert with_it.suggest("r") == {"values": None}
    with_it.on_trial_result("r", {"val/top1": 0.9, "training_iteration": 1})
    with_it.save(str(tmp_path / "state"))
    again = search(reference=True)
    again.restore(str(tmp_path / "state"))  # a sweep is continued
    again.on_trial_complete("r", {"val/top1": 0.9})
    for trial in "abc":
        assert again.suggest(trial) == without.suggest(trial)
        again.on_trial_complete(trial, {"val/top1": 0.5})
        without.on_trial_complete(trial, {"val/top1": 0.5})
