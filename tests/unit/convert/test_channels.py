"""Weights are adapted to other channels as in timm, and files for 1 to 13 channels are read as they are."""

import pytest
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv

from mixmae.convert import adapt_channels, load_encoder, read_weights, to_official, with_channels
from mixmae.inference import load_classifier, load_frozen
from mixmae.pixels import usual_normalisation
from tests.factories import noise_images, seeded, tiny_pvt, tiny_resnetv2, tiny_svt, tiny_swin, tiny_vit

BUILDERS = [tiny_swin, tiny_vit, tiny_pvt, tiny_svt, tiny_resnetv2]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_the_rule_is_timms(channels):
    weight = torch.randn(8, 3, 4, 4, generator=seeded())
    torch.testing.assert_close(adapt_channels(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize("channels", [2, 3, 4, 13])
def test_one_channel_repeated_gives_what_it_gave(channels):
    weight = torch.randn(8, 1, 4, 4, generator=seeded())
    image = torch.randn(1, 1, 8, 8, generator=seeded(1))
    conv = torch.nn.functional.conv2d
    repeated = conv(image.expand(1, channels, 8, 8), adapt_channels(weight, channels))
    torch.testing.assert_close(repeated, conv(image, weight), rtol=1e-4, atol=1e-5)
    back = adapt_channels(adapt_channels(weight, channels), 1)
    torch.testing.assert_close(back, weight)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("build", BUILDERS)
def test_files_of_any_channels_are_read_as_they_are(tmp_path, build, channels):
    made = build(in_channels=channels).eval()
    save_file(made.state_dict(), tmp_path / "any.safetensors")
    encoder, metadata = load_encoder(tmp_path / "any.safetensors", encoder=made.config)
    assert metadata.encoder.in_channels == channels
    assert (metadata.preprocessing.mean, metadata.preprocessing.std) == usual_normalisation(channels)
    images = noise_images(1, made.image_size, channels=channels)
    with torch.no_grad():
        assert torch.equal(encoder(images), made(images))


@pytest.mark.parametrize("build", BUILDERS)
def test_the_first_layer_of_every_encoder_is_adapted(tmp_path, build):
    made = build()
    save_file(made.state_dict(), tmp_path / "rgb.safetensors")
    weights = read_weights(tmp_path / "rgb.safetensors", encoder=made.config)
    assert with_channels(weights, 3) is weights
    adapted = with_channels(weights, 1)
    (name,) = (name for name in weights.state if adapted.state[name] is not weights.state[name])
    assert torch.equal(adapted.state[name], weights.state[name].sum(dim=1, keepdim=True))
    assert adapted.metadata.encoder.in_channels == 1
    assert (adapted.metadata.preprocessing.mean, adapted.metadata.preprocessing.std) == usual_normalisation(1)


def test_channels_that_no_image_file_has_are_refused_where_images_are_read(tmp_path):
    torch.save(to_official(tiny_swin(in_channels=13).state_dict()), tmp_path / "bands.pth")
    for load in (load_frozen, load_classifier):
        with pytest.raises(ValueError, match=r"bands.pth is for images of 13 channels, and image files are read as 1"):
            load(tmp_path / "bands.pth", device="cpu")
