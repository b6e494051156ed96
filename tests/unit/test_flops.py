"""Counts against the figures of the official classes, and one small model by hand."""

import dataclasses

import pytest
import torch

from mixmae.encoders.swin import SwinEncoder, swin_base, swin_huge, swin_large
from mixmae.encoders.vit import ViTEncoder, vit_base
from mixmae.finetune.classification import ImageClassifier
from mixmae.flops import count_macs, count_parameters, official_macs
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from tests.factories import seeded, tiny_swin

WINDOWS_384 = (16, 16, 24, 12)


@pytest.mark.parametrize(
    ("config", "image_size", "parameters", "gmacs"),
    [
        (swin_base(), 224, 88_344_352, "16.353"),
        (swin_large(), 224, 197_396_668, "35.859"),
        (swin_huge(), 224, 659_262_658, "117.667"),  # the parameters are an official figure, the MACs ours
        (dataclasses.replace(swin_base(), window_sizes=WINDOWS_384), 384, 89_577_440, "52.57"),
        (dataclasses.replace(swin_large(), window_sizes=WINDOWS_384), 384, 199_246_300, "112.15"),
    ],
    ids=["base", "large", "huge", "base-384", "large-384"],
)
def test_finetuning_figures(config, image_size, parameters, gmacs):
    with torch.device("meta"):
        model = ImageClassifier(SwinEncoder(dataclasses.replace(config, image_size=image_size)), 1000)
    assert count_parameters(model) == parameters
    digits = len(gmacs.split(".")[1])
    assert f"{count_macs(model, image_size).total / 1e9:.{digits}f}" == gmacs
    assert official_macs(model, image_size) == count_macs(model, image_size).total


def test_pretraining_figures():
    with torch.device("meta"):
        model = MixMAE(SwinEncoder(swin_base()), MixMAEConfig(num_images=2))
    assert count_parameters(model) == 114_665_784
    options = {"num_images": 2, "generator": seeded()}
    assert f"{official_macs(model, 224, **options) / 1e9:.3f}" == "19.002"
    unseen = count_macs(model, 224, **options).total - official_macs(model, 224, **options)
    assert unseen == 2 * 8 * 2 * 49 * 49 * 512  # images, blocks, products, pairs of cells, width


def test_macs_by_hand():
    """The last block of the tiny model at 96 px: 3 x 3 tokens of width 128 in one window, and the patch embedding."""
    encoder = tiny_swin()
    block = count_macs(encoder, 96, part="stages.3.blocks.0")
    assert block.linear == 9 * 12 * 128 * 128
    assert block.attention == 2 * 9 * 9 * 128
    assert block.norm == 5 * 2 * 9 * 128
    stem = count_macs(encoder, (96, 96), part="patch_embed")
    assert stem.convolution == 24 * 24 * 48 * 16
    assert stem.total == stem.convolution + stem.norm
    assert encoder.norm.weight.device.type == "cpu"  # counting left the model where it was


def test_unknown_part():
    with pytest.raises(ValueError, match="no part named 'neck'"):
        count_macs(tiny_swin(), 96, part="neck")


def test_costs_of_the_methods():
    """The table of docs/method.md: GMACs of encoder and decoder at 224 px, an image of the batch."""
    with torch.device("meta"):
        swin = SwinEncoder(swin_base())
        methods = {
            SimMIM(swin, SimMIMConfig()): (1, "16.35", "0.15"),
            MixMAE(swin, MixMAEConfig(num_images=2)): (2, "16.35", "2.69"),
            MixMAE(swin, MixMAEConfig(num_images=4)): (4, "16.35", "5.35"),
            MAE(ViTEncoder(vit_base()), MAEConfig()): (1, "4.33", "5.41"),
        }
    for method, (num_images, encoder, decoder) in methods.items():
        options = {"num_images": num_images, "generator": seeded()}
        parts = [count_macs(method, 224, part=part, **options).total for part in ("decoder", "")]
        assert (f"{(parts[1] - parts[0]) / 1e9:.2f}", f"{parts[0] / 1e9:.2f}") == (encoder, decoder)
    head = count_macs(next(iter(methods)), 224, generator=seeded(), part="decoder")
    assert head.total == head.linear == 49 * 1024 * 3072
