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
from mixmae.encoders.build import SIZES, config_to_json
from mixmae.encoders.swin import SwinEncoder, swin_tiny
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.flops import count_parameters
from tests.contract.test_encoders import ENCODERS
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


every_encoder = pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS)


@every_encoder
def test_every_encoder_behaves_as_a_model_of_timm(build):
    config = config_to_json(build().config)
    images = noise_images(2, (64, 96))

    def create(**kwargs):
        return timm.create_model("mixmae_encoder", encoder=config, img_size=(64, 96), **kwargs).eval()

    model = create(num_classes=7, drop_path_rate=0.1)
    assert model.encoder.image_size == (64, 96)
    assert model.encoder.config.drop_path == 0.1
    with torch.no_grad():
        nn.init.normal_(model.head.weight)
        tokens = model.forward_features(images)
        torch.testing.assert_close(model(images), tokens.mean(dim=1) @ model.head.weight.T + model.head.bias)
        model.reset_classifier(0)
        assert torch.equal(model(images), tokens.mean(dim=1))
        assert create(num_classes=0)(images).shape == (2, model.num_features)
        assert create(in_chans=1)(images[:, :1]).shape == (2, 1000)

        maps = create(features_only=True)
        strides, widths = maps.feature_info.reduction(), maps.feature_info.channels()
        for feature, stride, width in zip(maps(images), strides, widths, strict=True):
            assert feature.shape == (2, width, 64 // stride, 96 // stride)

        # What a hook on the named module sees is the feature, in whatever layout the encoder has inside.
        seen = {}
        names = [info["module"] for info in model.feature_info]
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda _, i, output, name=name: seen.update({name: output}))
        for name, feature in zip(names, model.encoder.features(images), strict=True):
            inside = seen[name][:, -feature[0, 0].numel() :] if seen[name].ndim == 3 else seen[name]
            assert torch.equal(inside.flatten().sort().values, feature.flatten().sort().values)


@every_encoder
def test_layer_decay_of_every_encoder(build):
    model = timm.create_model("mixmae_encoder", encoder=config_to_json(build().config), img_size=96, num_classes=7)
    depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    num_blocks = model.encoder.num_blocks
    assert sorted(set(depths.values())) == list(range(num_blocks + 2))  # the stem, the blocks, the head
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == 0.5 ** (num_blocks + 1 - depths[name])


def test_a_mae_file(tmp_path, capsys):
    """A ViT with a class token, as MAE stores it; at another input size its table is resized."""
    made = ViTEncoder(ViTConfig(image_size=96, embed_dim=192, depth=2, num_heads=3, class_token=True))
    state = made.state_dict()
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 1, 32)
    torch.save({"model": state}, tmp_path / "mae.pth")
    encoder = config_to_json(made.config)
    options = {"encoder": encoder, "pretrained": tmp_path / "mae.pth", "num_classes": 0}
    model = timm.create_model("mixmae_encoder", **options, img_size=96)
    images = noise_images(2)
    with torch.no_grad():
        assert torch.equal(model.eval().forward_features(images), made.eval()(images))
    larger = timm.create_model(
        "mixmae_encoder", encoder=encoder, pretrained=tmp_path / "mae.pth", num_classes=0, img_size=160
    )
    assert torch.equal(larger.encoder.pos_embed, resize_positions(made.pos_embed, (6, 6), (10, 10)))


def test_registration():
    assert set(timm.list_models("mixmae_*")) == {"mixmae_encoder", *(f"mixmae_{size}" for size in SIZES)}
    with torch.device("meta"):
        for name, first in (("pvt_large", "stages.0.patch_embed.proj"), ("resnetv2_50x3", "stem.conv")):
            model = timm.create_model(f"mixmae_{name}")
            assert model.encoder.config == SIZES[name]()
            assert model.pretrained_cfg["first_conv"] == f"encoder.{first}"
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
