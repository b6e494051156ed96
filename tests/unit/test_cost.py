"""What a step costs, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixmae.cost import CARDS, Card, StepCost, largest_micro_batch, measure_step
from mixmae.decoders import DecoderConfig
from mixmae.flops import count_macs
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.training.optim import OptimConfig, build_optimizer
from tests.factories import tiny_swin

WIDTH, HIDDEN, BATCH = 12, 64, 10
IMAGE = (96, 96)
METHOD = MixMAEConfig(num_images=2, decoder=DecoderConfig(dim=32, depth=1, num_heads=2))
SLOW_CARD = Card(memory_gib=1, bfloat16_tflops=2, float32_tflops=1, bandwidth_gb_s=1e9)
"""Its arithmetic alone takes time."""


class Squares(nn.Module):
    """Two linear layers with squares between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.last = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images.flatten(1)) ** 2).sum()


def squares(**options) -> StepCost:
    return measure_step(
        Squares,
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        lambda model, images: model(images),
        image_shape=(3, 2, 2),
        images=BATCH,
        **options,
    )


def test_bytes_of_a_small_net_by_hand():
    cost = squares()
    weights = 4 * (WIDTH * HIDDEN + HIDDEN)
    assert (cost.weights, cost.gradients) == (weights, weights)
    assert cost.optimizer == 2 * weights + 2 * 4  # two moments, and a count of steps for each parameter
    # The first layer keeps its input, which is there anyway; between the layers are the product and its square.
    assert cost.activations == {"loss": 4 * BATCH * HIDDEN, "last": 4 * BATCH * HIDDEN}
    assert cost.peak >= 4 * weights + 4 * BATCH * WIDTH + 2 * 4 * BATCH * HIDDEN
    assert cost.peak <= 4 * weights + 4 * BATCH * WIDTH + 5 * 4 * BATCH * HIDDEN
    assert cost.seconds is None


def test_time_on_a_card_is_that_of_the_slower_of_arithmetic_and_memory():
    first, last = 2 * BATCH * WIDTH * HIDDEN, 2 * BATCH * HIDDEN
    flops = 2 * first + 3 * last  # nobody needs the gradient of the images
    assert squares().flops == flops
    cost = squares(card=SLOW_CARD)
    assert cost.product_seconds == pytest.approx(flops / 1e12, rel=1e-3)
    halved = squares(card=SLOW_CARD, precision="bfloat16")
    assert halved.product_seconds == pytest.approx(flops / 2e12, rel=1e-3)
    narrow = Card(memory_gib=1, bfloat16_tflops=1e9, float32_tflops=1e9, bandwidth_gb_s=1)
    moved = squares(card=narrow)
    # The optimiser alone reads four numbers for each weight, and writes three.
    assert moved.seconds > 7 * cost.weights / 1e9
    assert moved.product_seconds < moved.seconds


def pretraining(images: int, **options) -> StepCost:
    return measure_step(
        lambda: MixMAE(tiny_swin(), METHOD),
        lambda model: build_optimizer(model, OptimConfig()),
        lambda model, batch: model(batch, generator=torch.Generator().manual_seed(0)).loss,
        image_shape=(3, *IMAGE),
        images=images,
        **options,
    )


def test_flops_of_pretraining_are_three_forwards():
    encoder = tiny_swin()
    model = MixMAE(encoder, METHOD)
    macs = count_macs(model, encoder.image_size, num_images=4, generator=torch.Generator())
    cost = pretraining(4)
    forward = 2 * 4 * (macs.total - macs.norm)
    assert cost.flops == pytest.approx(3 * forward, rel=0.05)


def test_parts_of_an_encoder_are_told_apart_and_a_card_keeps_no_scores():
    on_cpu, on_card = pretraining(4), pretraining(4, card=CARDS["H100"])
    stages = {f"encoder.stages.{index}" for index in range(4)}
    assert stages | {"decoder", "encoder.patch_embed"} <= on_cpu.activations.keys()
    for stage in stages:
        assert on_card.activations[stage] < on_cpu.activations[stage]
    halved = pretraining(4, card=CARDS["H100"], precision="bfloat16")
    stage = "encoder.stages.0"  # later ones keep more of their weights, cast, than of so few images
    assert halved.activations[stage] < 0.8 * on_card.activations[stage]


def test_the_largest_micro_batch_is_the_last_that_fits():
    costs = {images: pretraining(images) for images in (2, 4, 6, 8)}
    for fits, images in ((6, 6), (8, 8)):
        memory = costs[images].peak * 1.001
        assert largest_micro_batch(lambda n: costs[n], unit=2, limit=64, memory=memory) == fits
    assert largest_micro_batch(lambda n: costs[n], unit=2, limit=4, memory=1e12) == 4
    assert largest_micro_batch(lambda n: costs[n], unit=2, limit=4, memory=1000) == 0
