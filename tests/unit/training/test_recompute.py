"""The same gradients from less memory."""

import pytest
import torch

from mixmae.cost import measure_step
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.training.recompute import recompute_stages
from tests.factories import DECODER, noise_images, seeded, tiny_pvt_v2, tiny_resnetv2, tiny_swin, tiny_vit


def model_of(build, stages):
    unmixing = "none" if build is tiny_resnetv2 else "attention"
    method = MixMAE(build(), MixMAEConfig(num_images=2, decoder=DECODER, unmixing=unmixing))
    for module in method.modules():
        if hasattr(module, "rate"):
            module.rate = 0.3  # drop path
    recompute_stages(method, stages)
    return method


@pytest.mark.parametrize(
    ("build", "stages"), [(tiny_swin, (1, 3)), (tiny_pvt_v2, (2,)), (tiny_resnetv2, (1, 2)), (tiny_vit, (1,))]
)
def test_gradients_are_the_same(build, stages):
    found = []
    for chosen in ((), stages):
        method = model_of(build, chosen)
        torch.manual_seed(3)
        method(noise_images(4), generator=seeded()).loss.backward()
        found.append([parameter.grad for parameter in method.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_it_takes_less_memory():
    kept, again = (
        measure_step(
            lambda stages=stages: model_of(tiny_swin, stages),
            lambda model: torch.optim.AdamW(model.parameters(), fused=True),
            lambda model, images: model(images, generator=seeded()).loss,
            image_shape=(3, 96, 96),
            images=8,
        )
        for stages in ((), (1, 2, 3, 4))
    )
    assert again.peak - again.state < 0.8 * (kept.peak - kept.state)
