"""Stochastic depth: by hand and by frequency."""

import pytest
import torch

from mixmae.layers.drop_path import DropPath, drop_path_rates


def test_rates_rise_linearly_over_all_stages():
    assert drop_path_rates(0.4, (1, 2, 2)) == [[0.0], pytest.approx([0.1, 0.2]), pytest.approx([0.3, 0.4])]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


def test_whole_samples_drop_and_the_mean_stays():
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.04)


def test_evaluation_drops_nothing():
    x = torch.randn(4, 2)
    assert DropPath(0.9).eval()(x) is x
