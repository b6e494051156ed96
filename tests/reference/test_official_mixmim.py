"""The official code's numbers, to 1e-5 relative in float32 (golden/README.md says what the files hold)."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay

from mixmae.convert import config_from_official, from_official, load_weights, to_official
from mixmae.encoders.swin import SwinEncoder, swin_base, swin_tiny
from mixmae.finetune.classification import ImageClassifier
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.training.optim import OptimConfig, parameter_groups

GOLDEN = Path(__file__).parents[1] / "golden"
RTOL = 1e-5


def read(name, prefix="model."):
    """Split a golden file into its numbers and the state dict below a prefix."""
    content = load_file(GOLDEN / name)
    weights = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return content, weights


def assert_close(ours, official):
    """Within RTOL of the largest official value."""
    assert ours.shape == official.shape
    assert (ours - official).abs().max() <= RTOL * official.abs().max()


@pytest.fixture(scope="module")
def pretraining():
    golden, weights = read("mixmim_tiny_pretrain.safetensors")
    configs = config_from_official(weights, decoder_num_heads=4)
    method = MixMAE(SwinEncoder(configs.encoder), MixMAEConfig(num_images=2, decoder=configs.decoder))
    own_tables = method.encoder.pos_embed.clone(), method.decoder.pos_embed.clone()
    report = load_weights(method, from_official(weights))
    assert report.matched_share == 1.0
    assert not report.unexpected
    return golden, weights, method, own_tables


@pytest.fixture(scope="module")
def official_mix(pretraining):
    """The official mixing: mask 1 shows the partner, and the partner is the batch reversed."""
    golden = pretraining[0]
    batch = len(golden["input"])
    index = torch.arange(batch)
    return golden["mask"].view(1, 3, 3).long(), torch.stack([index, index.flip(0)], dim=1)


def test_position_tables(pretraining):
    _, weights, _, (encoder_table, decoder_table) = pretraining
    assert_close(encoder_table, weights["absolute_pos_embed"])
    assert_close(decoder_table, weights["decoder_pos_embed"])


def test_encoded_and_reconstructed(pretraining, official_mix):
    golden, _, method, _ = pretraining
    group_map, partners = official_mix
    with torch.no_grad():
        mixed = method.mix(golden["input"], method.draw(golden["input"], None, group_map, partners))
        encoded = method.encode(mixed)
        predicted, _ = method.decode(encoded, mixed)  # (4, 2, 9, 3072)
    assert_close(encoded, golden["encoded"])
    assert_close(predicted.transpose(0, 1).flatten(0, 1), golden["reconstructed"])


def test_loss_and_gradients(pretraining, official_mix):
    golden, _, method, _ = pretraining
    group_map, partners = official_mix
    method.zero_grad()
    loss = method(golden["input"], group_map=group_map, partners=partners).loss
    assert_close(loss[None], golden["loss"])
    loss.backward()
    gradients = to_official({name: parameter.grad for name, parameter in method.named_parameters()})
    norms = {name.removeprefix("grad_norm."): value for name, value in golden.items() if name.startswith("grad_norm.")}
    assert norms.keys() == {name for name in gradients if not name.endswith("relative_position_index")}
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=RTOL), name


@pytest.mark.parametrize("name", ["mixmim_tiny_pretrain.safetensors", "mixmim_tiny_finetune.safetensors"])
def test_weights_come_back_identical(name):
    weights = read(name)[1]
    back = to_official(from_official(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_logits():
    golden, weights = read("mixmim_tiny_finetune.safetensors")
    configs = config_from_official(weights)
    assert configs.num_classes == 10
    classifier = ImageClassifier(SwinEncoder(configs.encoder), configs.num_classes)
    assert load_weights(classifier, from_official(weights)).matched_share == 1.0
    with torch.no_grad():
        assert_close(classifier(golden["input"]), golden["logits"])


def test_layer_decay_of_the_official_rule():
    """Rate and weight decay of every parameter."""
    golden = json.loads((GOLDEN / "mixmim_optimization.json").read_text())["layer_decay_0.75_mixmim_base"]["parameters"]
    with torch.device("meta"):
        model = ImageClassifier(SwinEncoder(swin_base()), 1000)
    ours = {_official(name): value for name, value in scales(model, rule="official").items()}
    official = {name: value for name, value in golden.items() if name != "absolute_pos_embed"}  # a buffer here
    assert ours.keys() == official.keys()
    for name, (scale, decay) in official.items():
        assert ours[name] == (pytest.approx(scale, rel=1e-6), decay), name


def test_layer_decay_of_timm():
    """Against timm's own groups of its Swin, whose names differ in `layers` and `head.fc` alone."""
    other = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    groups = param_groups_layer_decay(other, 0.05, no_weight_decay_list=other.no_weight_decay(), layer_decay=0.75)
    expected = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    with torch.device("meta"):
        model = ImageClassifier(SwinEncoder(swin_tiny()), 1000)
    ours = {
        re.sub(r"^head\.", "head.fc.", re.sub("^stages", "layers", name.removeprefix("encoder."))): value
        for name, value in scales(model, rule="timm").items()
    }
    assert ours == {name: expected[id(parameter)] for name, parameter in other.named_parameters()}


def scales(model, rule):
    """(rate scale, weight decay) of every parameter by name, at layer decay 0.75."""
    groups = parameter_groups(model, OptimConfig(layer_decay=0.75, layer_decay_rule=rule))
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


def _official(name):
    return next(key for key in to_official({name: torch.empty(9, 1)}) if not key.endswith("relative_position_index"))
