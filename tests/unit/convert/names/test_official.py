"""The names of the official code and of mmpretrain, there and back. Their numbers are in tests/reference."""

import dataclasses

import pytest
import torch

from mixmae.convert import (
    config_from_mmpretrain,
    config_from_official,
    from_mmpretrain,
    from_official,
    to_mmpretrain,
    to_official,
)
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from tests.factories import small_swin, tiny_mixmae, tiny_swin

MODELS = pytest.mark.parametrize(
    "model",
    [tiny_mixmae(), ImageClassifier(tiny_swin(), 10), ImageClassifier(small_swin(), 10)],
    ids=["pretraining", "finetuning", "two stages"],
)
ODD = SwinConfig(
    image_size=(64, 96),
    in_channels=5,
    embed_dim=24,
    depths=(1, 2, 3, 1),
    num_heads=(2, 3, 4, 6),
    window_sizes=(8, 5, 4, 2),
    mlp_ratio=2.0,
)


@MODELS
@pytest.mark.parametrize(
    ("there", "back"), [(to_official, from_official), (to_mmpretrain, from_mmpretrain)], ids=["mixmim", "mmpretrain"]
)
def test_round_trip(model, there, back):
    ours = model.state_dict()
    theirs = there(ours)
    returned = back(theirs)
    assert returned.keys() == ours.keys()
    assert all(torch.equal(returned[name], ours[name]) for name in ours)
    again = there(returned)
    assert list(again) == list(theirs)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_a_stage_ends_with_its_downsampling_in_official_names():
    ours = tiny_mixmae().state_dict()
    official = to_official(ours)
    assert torch.equal(official["layers.2.downsample.norm.weight"], ours["encoder.stages.3.downsample.norm.weight"])
    assert "layers.3.downsample.norm.weight" not in official


@pytest.mark.parametrize(
    ("there", "read"), [(to_official, config_from_official), (to_mmpretrain, config_from_mmpretrain)]
)
def test_configs_are_read_off_the_shapes(there, read):
    state = there(ImageClassifier(SwinEncoder(ODD), 11).state_dict())
    found = read(state, image_size=(64, 96))
    assert found.encoder == ODD
    assert found.decoder is None
    assert found.num_classes == 11
    with pytest.raises(ValueError, match="pass image_size"):
        read(state)


@pytest.mark.parametrize(
    ("there", "read"), [(to_official, config_from_official), (to_mmpretrain, config_from_mmpretrain)]
)
def test_decoder_heads_are_asked_for_where_shapes_do_not_tell(there, read):
    method = tiny_mixmae()
    state = there(method.state_dict())
    with pytest.raises(ValueError, match="pass decoder_num_heads"):
        read(state)
    found = read(state, decoder_num_heads=4)
    # mmpretrain's decoder has another epsilon, which golden/ shows.
    assert dataclasses.replace(found.decoder, norm_eps=1e-5) == method.config.decoder
    assert found.encoder == method.encoder.config
    assert found.num_classes is None
