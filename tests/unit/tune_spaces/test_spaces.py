"""All the spaces that can be named on the command line: each fits its recipe."""

from __future__ import annotations

import pytest

from mixmae.jobs.config import DetectConfig, PretrainConfig
from pipelines.sweep import base_config
from tune_spaces import SPACES
from tune_spaces.fields import get_field, set_fields
from tune_spaces.transfer import TRANSFERS


@pytest.mark.parametrize("name", SPACES)
def test_every_space_fits_its_recipe(name):
    base = base_config(SPACES[name])
    SPACES[name].check(base)
    assert SPACES[name].pretrains == isinstance(base, PretrainConfig)
    assert SPACES[name].registers == (not isinstance(base, PretrainConfig | DetectConfig))
    for point in SPACES[name].points(seed=0):
        config = set_fields(base, point)
        assert {field: get_field(config, field) for field in point} == point


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("swin_base", 0.15),
        ("swin_large", 0.2),
        ("swin_huge", 0.3),
        *((transfer.name, 0.15) for transfer in TRANSFERS),
    ],
)
def test_the_papers_settings_are_a_point_of_its_grid(name, paper):
    swin = SPACES[f"finetune_{name}"]
    assert f"_{name}_" in swin.recipe
    assert {"optim.layer_decay": 0.7, "encoder.drop_path": paper} in swin.points(0)
    base = base_config(swin)
    assert (base.optim.layer_decay, base.encoder.drop_path) == (0.7, paper)
