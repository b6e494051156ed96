"""The config of a run: what may differ when it is continued, and how a batch is cut."""

from __future__ import annotations

import json

from mixmae.jobs.config import differences, to_json
from mixmae.training.checkpoint import upgraded
from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES


def test_only_what_changes_the_result_counts_as_a_difference():
    before = to_json(PRETRAIN_RECIPES["demo"]())
    now = json.loads(json.dumps(before))
    now["loop"]["log_every_steps"] = 1
    now["stream"]["prefetch_blocks"] = 9
    assert differences(before, now) == []
    now["optim"]["betas"] = [0.9, 0.99]
    assert differences(before, now) == ["optim.betas was [0.9, 0.95] and is [0.9, 0.99]"]


def test_a_run_begun_before_there_was_a_probe_goes_on():
    now = to_json(PRETRAIN_RECIPES["demo"]())
    before = {name: value for name, value in now.items() if name != "probe"}
    assert differences(before, now) == []
    assert differences({**now, "probe": {"images": 0, "k": 1}}, now) == []


def test_configs_of_earlier_versions_are_understood():
    """Their names for the evaluation's interval and for the validation's crop."""
    for now in (to_json(PRETRAIN_RECIPES["demo"]()), to_json(FINETUNE_RECIPES["demo_finetune"]())):
        before = json.loads(json.dumps(now))
        before["loop"]["panel_every_epochs"] = before["loop"].pop("evaluate_every_epochs")
        if "crop_pct" in before:
            before["resize_share"] = before.pop("crop_pct")
        assert upgraded(before) == upgraded(now) == now
        assert "panel_every_epochs" in before["loop"]  # the argument is left alone
