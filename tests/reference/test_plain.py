"""Ours against the straightforward step that the benchmarks measure it by: the same loss and gradients."""

import pytest
import torch

from benchmarks.plain_mixmae import PlainMixMAE
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.mixing import cyclic_partners
from tests.factories import DECODER, group_maps, noise_images, tiny_swin, trained


@pytest.mark.parametrize("num_images", [2, 3, 4])
def test_loss_and_gradients(num_images):
    ours = trained(MixMAE(tiny_swin(), MixMAEConfig(num_images=num_images, decoder=DECODER))).double()
    plain = PlainMixMAE(ours.encoder.config, DECODER, num_images).double()
    plain.load_state_dict(ours.state_dict())
    images = noise_images(2 * num_images).double()
    group_map, partners = group_maps(num_images=num_images), cyclic_partners(len(images), num_images)
    plain_loss, loss = plain(images, group_map, partners), ours(images, group_map=group_map).loss
    torch.testing.assert_close(loss.double(), plain_loss, rtol=1e-6, atol=0)  # ours compares pixels in float32
    plain_loss.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)
