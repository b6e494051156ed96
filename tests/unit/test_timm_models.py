"""The encoders behave as timm's models do, with the numbers of our own classifier."""

import dataclasses

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import mixmae.timm_models
from mixmae.convert import Preprocessing, load_weights, resize_bias_table, resize_positions, save_encoder, to_official
from mixmae.encoders.build import config_to_json
from mixmae.encoders.swin import SwinEncoder, swin_tiny
from mixmae.finetune.classification import ImageClassifier
from mixmae.flops import count_parameters
from tests.factories import noise_images, tiny_mixmae, tiny_swin

TINY = config_to_json(tiny_swin().config)


def tiny(**kwargs):
    return timm.create_model("mixmae_encoder", **{"encoder": TINY, "img_size": 96, **kwargs}).eval()


@pytest.fixture
def classifier(tmp_path):
    """Our classifier with a head that matters, and its file."""
    torch.manual_seed(3)
    model = ImageClassifier(tiny_swin(), 7).eval()
    nn.init.normal_(model.head.weight)
    save_encoder(tmp_path / "classifier.safetensors", model, Preprocessing(image_size=(96, 96)))
    return model, str(tmp_path / "classifier.safetensors")


SOURCES = {
    "pretrained": lambda path: {"pretrained": path},
    "overlay": lambda path: {"pretrained": True, "pretrained_cfg_overlay": {"file": path}},
    "checkpoint_path": lambda path: {"checkpoint_path": path},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_numbers_of_our_classifier(classifier, source):
    ours, path = classifier
    model = tiny(num_classes=7, **source(path))
    images = noise_images(2)
    with torch.no_grad():
        assert torch.equal(model(images), ours(images))
        tokens = model.forward_features(images)
        assert torch.equal(tokens, ours.encoder(images))
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens.mean(dim=1))
        model.reset_classifier(0, "")
        assert torch.equal(model(images), tokens)


def test_heads(classifier, capsys):
    ours, path = classifier
    model = tiny(num_classes=3, pretrained=path)  # other classes: a fresh head, as in timm
    assert "2 mismatched (head." in capsys.readouterr().out
    assert model.get_classifier().out_features == model.num_classes == 3
    assert model.head.weight.abs().max() < 1e-3
    images = noise_images(2)
    none = tiny(num_classes=0, pretrained=path)
    with torch.no_grad():
        assert torch.equal(none(images), ours.encoder(images).mean(dim=1))
    assert none.num_features == none.head_hidden_size == 128
    with pytest.raises(ValueError, match="global_pool must be"):
        none.reset_classifier(3, "max")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("mixmae_swin_tiny", pretrained=True)


def test_features(classifier):
    ours, path = classifier
    model = tiny(features_only=True, pretrained=path)
    assert model.feature_info.channels() == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    images = noise_images(2)
    with torch.no_grad():
        expected = ours.encoder.features(images)
        assert all(torch.equal(a, b) for a, b in zip(model(images), expected, strict=True))
        some = tiny(features_only=True, pretrained=path, out_indices=(1, 3))
        assert all(torch.equal(a, b) for a, b in zip(some(images), expected[1::2], strict=True))
        whole = tiny(pretrained=path, num_classes=7)
        final, last = whole.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC")
        assert torch.equal(final, ours.encoder(images))
        assert torch.equal(last[0].flatten(1, 2), final)
        tokens = whole.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        assert torch.equal(tokens[2], expected[2].flatten(2).mT)


def test_384_px_has_the_official_windows_and_resized_tables(tmp_path):
    torch.manual_seed(0)
    made = SwinEncoder(swin_tiny())
    torch.save({"model": to_official(made.state_dict())}, tmp_path / "official.pth")
    model = timm.create_model("mixmae_swin_tiny", img_size=384, pretrained=tmp_path / "official.pth", num_classes=0)
    assert model.encoder.config == dataclasses.replace(swin_tiny(), image_size=384, window_sizes=(16, 16, 24, 12))
    own, state = model.encoder.state_dict(), made.state_dict()
    assert torch.equal(own["pos_embed"], resize_positions(state["pos_embed"], (56, 56), (96, 96)))
    for stage, window in enumerate((16, 16, 24, 12)):
        name = f"stages.{stage}.blocks.1.attn.relative_position_bias_table"
        assert torch.equal(own[name], resize_bias_table(state[name], window))
    with torch.device("meta"):
        base = timm.create_model("mixmae_swin_base", img_size=384)
    assert count_parameters(base) == 89_577_440  # the official class at 384 px


def test_other_channels_as_in_timm(tmp_path):
    made = tiny_mixmae()
    torch.save(to_official(made.state_dict()), tmp_path / "official.pth")
    model = tiny(in_chans=1, pretrained=str(tmp_path / "official.pth"), num_classes=0)
    weight = made.encoder.patch_embed.proj.weight
    torch.testing.assert_close(model.encoder.patch_embed.proj.weight, weight.sum(dim=1, keepdim=True))
    assert model(noise_images(1, channels=1)).shape == (1, 128)
    assert tiny(in_chans=5, pretrained=str(tmp_path / "official.pth")).encoder.in_channels == 5


def test_layer_decay_of_timm():
    """Every parameter has the rate that timm gives its own Swin (tests/reference has that comparison)."""
    with torch.device("meta"):
        model = timm.create_model("mixmae_swin_tiny", num_classes=10, drop_path_rate=0.1)
    depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert depths["encoder.patch_embed.proj.weight"] == 0
    assert depths["encoder.stages.2.downsample.norm.weight"] == depths["encoder.stages.2.blocks.0.norm1.weight"] == 5
    assert depths["head.weight"] == 13
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == (1.0, 0.05)
    assert scales[id(model.encoder.stages[3].blocks[1].mlp.fc1.weight)] == (0.5, 0.05)
    assert scales[id(model.encoder.stages[3].blocks[1].attn.relative_position_bias_table)] == (0.5, 0.0)
    assert scales[id(model.encoder.patch_embed.proj.weight)] == (0.5**13, 0.05)


def test_registration():
    names = timm.list_models("mixmae_*")
    assert {"mixmae_encoder", "mixmae_swin_tiny", "mixmae_swin_base", "mixmae_swin_huge"} <= set(names)
    assert mixmae.timm_models.default_cfgs["mixmae_swin_base"].default.classifier == "head"
    with torch.device("meta"):
        model = timm.create_model("mixmae_swin_base", drop_path_rate=0.2, window_sizes=(7, 7, 7, 7))
    assert model.default_cfg["architecture"] == "mixmae_swin_base"
    assert model.encoder.config.drop_path == 0.2
    assert model.encoder.config.window_sizes == (7, 7, 7, 7)
    assert model.num_classes == 1000
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == (0.485, 0.456, 0.406)
    report = load_weights(ImageClassifier(tiny_swin(), 7), tiny(num_classes=7).state_dict())
    assert report.matched_share == 1.0  # the names are ours
    assert not report.unexpected
