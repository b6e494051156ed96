"""The norms of dense tasks, and what they leave untrained."""

import pytest
import torch

from mixmae.encoders.dense import StageNorms, freeze_final_norm
from tests.factories import (
    noise_images,
    tiny_pcpvt,
    tiny_pvt,
    tiny_pvt_v2,
    tiny_resnetv2,
    tiny_svt,
    tiny_swin,
    tiny_vit,
)


def test_each_token_of_each_stage_is_normalised_over_its_channels():
    features = [torch.randn(2, 8, 4, 6) * 5 + 3, torch.randn(2, 16, 2, 3)]
    norms = StageNorms((8, 16))
    for feature, normed in zip(features, norms(features), strict=True):
        assert normed.shape == feature.shape
        assert normed.mean(dim=1).abs().max() < 1e-5
        assert (normed.var(dim=1, unbiased=False) - 1).abs().max() < 1e-3
    assert [name for name, _ in norms.named_parameters()] == [
        f"norm{stage}.{part}" for stage in range(2) for part in ("weight", "bias")
    ]


@pytest.mark.parametrize("make", [tiny_swin, tiny_pvt, tiny_pvt_v2, tiny_pcpvt, tiny_svt, tiny_vit, tiny_resnetv2])
def test_every_trained_parameter_gets_a_gradient_from_the_features(make):
    encoder = make()
    freeze_final_norm(encoder)
    features = encoder.features(noise_images(1, encoder.image_size))
    sum(feature.square().sum() for feature in features).backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    frozen = encoder.named_parameters()
    assert not [name for name, p in frozen if not p.requires_grad and p.grad is not None]
