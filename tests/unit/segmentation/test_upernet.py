"""UPerNet: its cost to the digit, its parts by hand, and which encoders it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import swin_base, swin_large, with_dense_windows
from mixmae.flops import count_macs
from mixmae.segmentation.upernet import ConvBlock, UPerNet, UPerNetConfig
from mixmae.training.optim import OptimConfig, parameter_groups
from tests.factories import (
    noise_images,
    small_swin,
    swin_of_pixels,
    tiny_pvt,
    tiny_resnetv2,
    tiny_svt,
    tiny_swin,
    tiny_vit,
)

SMALL = UPerNetConfig(channels=16, aux_channels=8)


@pytest.mark.parametrize(
    ("size", "parameters", "macs", "head_macs"),
    [(swin_base, 121_721_892, 302.090, 212.141), (swin_large, 234_423_200, 407.811, 213.697)],
)
def test_cost_is_the_papers_to_the_digit(size, parameters, macs, head_macs):
    """122 M and 302 G of Swin-B, without the norms of the stages. (Of Swin-L the paper prints 236 M and 460 G, which no
    variant gives.)"""
    with torch.device("meta"):
        model = UPerNet(build_encoder(replace(with_dense_windows(size()), image_size=512)), 150, UPerNetConfig()).eval()
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == parameters
    norms = count_macs(model, 512, part="norms").total
    assert norms == 5 * (128**2 + 64**2 * 2 + 32**2 * 4 + 16**2 * 8) * model.encoder.channels[0]
    assert round((count_macs(model, 512).total - norms) / 1e9, 3) == macs
    assert round(count_macs(model, 512, part="head").total / 1e9, 3) == head_macs


def test_parameters_of_the_heads():
    with torch.device("meta"):
        model = UPerNet(build_encoder(swin_base()), 150, UPerNetConfig())
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 33_315_990
    assert sum(parameter.numel() for parameter in model.auxiliary.parameters()) == 1_218_710


@pytest.mark.parametrize("make", [tiny_swin, tiny_pvt, tiny_svt, tiny_resnetv2])
def test_encoders_of_four_stages(make):
    _check(make(), (96, 64))


@pytest.mark.parametrize("make", [small_swin, swin_of_pixels])
def test_encoders_of_two_and_three_stages(make):
    encoder = make()
    _check(encoder, (2 * encoder.strides[-1], 3 * encoder.strides[-1]))


def _check(encoder, size):
    model = UPerNet(encoder, 5, SMALL).train()
    scores, auxiliary = model(noise_images(2, size), with_auxiliary=True)
    assert scores.shape == (2, 5, size[0] // encoder.strides[0], size[1] // encoder.strides[0])
    assert auxiliary.shape == (2, 5, size[0] // encoder.strides[-2], size[1] // encoder.strides[-2])
    (scores.square().sum() + auxiliary.square().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # or several workers would wait for each other


def test_an_encoder_of_one_stage():
    with pytest.raises(ValueError, match="at least two stages, and ViTEncoder has one"):
        UPerNet(tiny_vit(), 5, SMALL)


def test_scores_depend_on_all_stages():
    model, images = UPerNet(tiny_swin(), 5, replace(SMALL, norm="group")).eval(), noise_images(1)
    features = model.norms(model.encoder.features(images))
    whole = model.head(features)
    torch.testing.assert_close(model(images), whole)
    for stage in range(4):
        changed = [feature + (index == stage) * torch.randn_like(feature) for index, feature in enumerate(features)]
        assert (model.head(changed) - whole).abs().max() > 1e-4


def test_pooling_reaches_the_whole_image():
    """The score of the upper left corner depends on the lower right pixel, through the pool of side 1."""
    model = UPerNet(small_swin(), 3, SMALL).eval()
    images = noise_images(1, (32, 32)).requires_grad_()
    model(images)[0, :, 0, 0].sum().backward()
    assert images.grad[0, :, -1, -1].abs().max() > 0


def test_without_an_auxiliary_head():
    model = UPerNet(small_swin(), 3, replace(SMALL, aux_weight=0.0))
    assert model.auxiliary is None
    assert model(noise_images(2, (32, 32)), with_auxiliary=True)[1] is None


def test_heads_and_norms_learn_at_the_full_rate():
    """timm's rule: the stem at decay ** (blocks + 1), what stands on the encoder at 1."""
    model = UPerNet(tiny_swin(), 3, SMALL)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, layer_decay_rule="timm"))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["encoder.patch_embed.proj.weight"] == 0.5**6
    assert scales["norms.norm0.weight"] == scales["head.classifier.weight"] == scales["auxiliary.conv.0.weight"] == 1.0
    assert "encoder.norm.weight" not in scales  # not trained


def test_group_norms_see_one_image_alone():
    block = ConvBlock(4, 12, kernel=3, norm="group").train()
    images = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(block(images)[1:2], block(images[1:2]))
    batch = ConvBlock(4, 12, kernel=3, norm="batch").train()
    assert (batch(images)[1:2] - batch(images[1:2])).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change", [{"channels": 0}, {"pool_scales": ()}, {"pool_scales": (0,)}, {"aux_weight": -1.0}, {"dropout": 1.0}]
)
def test_settings_that_make_no_sense(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        UPerNetConfig(**change)
