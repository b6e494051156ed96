"""Mixup and CutMix."""

from __future__ import annotations

import pytest
import torch

from mixmae.data.images.mixup import MixupConfig, mix_batch


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_say_what_is_shown(mixup, cutmix):
    """Image b is full of b's own number, so that the mean of the mix is the mix of the labels."""
    config = MixupConfig(mixup=mixup, cutmix=cutmix, label_smoothing=0.0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 40, 30)
    for seed in range(20):
        mixed, targets = mix_batch(config, images, torch.arange(4), 4, torch.Generator().manual_seed(seed))
        assert torch.allclose(targets.sum(dim=1), torch.ones(4))
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0), atol=1e-4)
        again, _ = mix_batch(config, images, torch.arange(4), 4, torch.Generator().manual_seed(seed))
        assert torch.equal(mixed, again)


def test_without_mixing_labels_are_smoothed():
    config = MixupConfig(mixup=0.0, cutmix=0.0)
    images = torch.rand(2, 3, 4, 4)
    same, targets = mix_batch(config, images, torch.tensor([2, 0]), 5, torch.Generator())
    assert torch.equal(same, images)
    assert torch.allclose(targets[0], torch.tensor([0.02, 0.02, 0.92, 0.02, 0.02]))


def test_bad_mixing():
    with pytest.raises(ValueError, match="mixup is -1"):
        MixupConfig(mixup=-1)
