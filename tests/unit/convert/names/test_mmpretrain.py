"""The order of channels in mmpretrain. Its names are tested with the official ones, its numbers in tests/reference."""

import torch

from mixmae.convert import from_mmpretrain, to_mmpretrain
from tests.factories import tiny_mixmae


def test_merged_channels_of_mmpretrain():
    """Two channels, a hand-worked permutation: channel by channel in row order, to token by token in column order."""
    name = "backbone.layers.0.downsample.norm.weight"
    theirs = to_mmpretrain(tiny_mixmae().state_dict())
    # Channel 0: upper left 0, upper right 1, lower left 2, lower right 3; channel 1: 4 to 7.
    theirs[name] = torch.arange(8)
    ours = from_mmpretrain(theirs)["encoder.stages.1.downsample.norm.weight"]
    assert ours.tolist() == [0, 4, 2, 6, 1, 5, 3, 7]  # upper left, lower left, upper right, lower right
