"""The config of a run: what may differ when it is continued, and how a batch is cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mixmae.jobs.config import differences, to_json
from mixmae.pixels import IMAGENET_MEAN, usual_normalisation
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


def test_mean_and_std_follow_the_encoders_channels_unless_they_are_given():
    rgb = PRETRAIN_RECIPES["demo"]()
    grey = replace(rgb, encoder=replace(rgb.encoder, in_channels=1))
    assert (grey.pixel_mean, grey.pixel_std) == usual_normalisation(1)
    assert replace(grey, encoder=rgb.encoder) == rgb
    assert rgb.pixel_mean == IMAGENET_MEAN
    own = replace(rgb, encoder=grey.encoder, pixel_mean=(0.1,), pixel_std=(0.3,))
    assert (own.pixel_mean, own.pixel_std) == ((0.1,), (0.3,))
    with pytest.raises(ValueError, match="need a value for each of the encoder's 3 channels"):
        replace(own, encoder=rgb.encoder)


def test_channels_that_no_file_is_read_with():
    rgb = PRETRAIN_RECIPES["demo"]()
    with pytest.raises(ValueError, match=r"in_channels is 13: .* change --encoder.in-channels"):
        replace(rgb, encoder=replace(rgb.encoder, in_channels=13))
