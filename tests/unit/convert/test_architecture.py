"""Architectures read off the shapes of weights."""

import dataclasses

import pytest
import torch

from mixmae.convert import (
    describe,
    from_mae,
    load_encoder,
    load_pretrained,
    read_architecture,
)
from mixmae.encoders.build import SIZES, build_encoder
from mixmae.encoders.pvt import pvt_tiny, pvt_v2_b0
from mixmae.encoders.swin import SwinEncoder, swin_base
from mixmae.encoders.twins import twins_svt_small
from mixmae.encoders.vit import vit_tiny
from mixmae.finetune.classification import ImageClassifier
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from tests.factories import (
    DECODER,
    noise_images,
    small_swin,
    swin_of_pixels,
    tiny_mixmae,
    tiny_pcpvt,
    tiny_pvt,
    tiny_pvt_v2,
    tiny_svt,
    tiny_vit,
)


@pytest.mark.parametrize("name", [name for name in SIZES if not name.endswith("_w7")])
def test_known_sizes_are_read_off_their_shapes(name):
    """Of the shifted Swins with positions shapes do not tell the shifts; our own files do."""
    config = SIZES[name]()
    with torch.device("meta"):
        state = {f"encoder.{key}": value for key, value in build_encoder(config).state_dict().items()}
    assert read_architecture(state).encoder == config
    assert f"({name})" in describe(state)
    larger = read_architecture(state, image_size=(256, 320)).encoder
    assert larger == dataclasses.replace(config, image_size=(256, 320))


@pytest.mark.parametrize("build", [small_swin, swin_of_pixels])
def test_patches_and_stages_are_read_off_their_shapes(build):
    made = build()
    state = {f"encoder.{name}": value for name, value in made.state_dict().items()}
    assert read_architecture(state).encoder == made.config
    method = MixMAE(made, MixMAEConfig(decoder=DECODER))
    assert read_architecture(method.state_dict(), decoder_num_heads=4).decoder == DECODER


@pytest.mark.parametrize("size", [pvt_tiny, pvt_v2_b0, twins_svt_small, vit_tiny])
def test_patches_of_known_widths_are_read_off_their_shapes(size):
    config = dataclasses.replace(size(), patch_px=2, image_size=64)
    with torch.device("meta"):
        state = {f"encoder.{name}": value for name, value in build_encoder(config).state_dict().items()}
    assert read_architecture(state, image_size=64).encoder == config


@pytest.mark.parametrize("build", [tiny_pvt, tiny_pvt_v2, tiny_pcpvt, tiny_svt, tiny_vit])
def test_heads_are_asked_for_where_shapes_do_not_tell(tmp_path, build):
    made = build()
    torch.save(made.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"how many heads a \w+ of width [\d-]+ has.*pass encoder="):
        load_encoder(tmp_path / "bare.pth")
    encoder, metadata = load_encoder(tmp_path / "bare.pth", encoder=made.config)
    assert metadata.encoder == made.config
    with torch.no_grad():
        assert torch.equal(encoder(noise_images(1)), made.eval()(noise_images(1)))
    assert load_pretrained(build(), tmp_path / "bare.pth").matched_share == 1.0


def test_architectures_in_words(vit_state):
    with torch.device("meta"):
        base = ImageClassifier(SwinEncoder(swin_base()), 10).state_dict()
    assert describe(base) == "a Swin of width 128 with 2-2-18-2 blocks (swin_base)"
    assert describe(tiny_mixmae().state_dict()) == "a Swin of width 16 with 1-1-2-1 blocks"
    assert describe(from_mae(vit_state)) == "a ViT of width 32 with 2 blocks"
