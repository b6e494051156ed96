"""Parameter groups, layer decay and the scaling rule. Numbers of other people's code are in tests/reference."""

import pytest
import torch
from torch import nn

from mixmae.finetune.classification import ImageClassifier
from mixmae.training.lars import Lars
from mixmae.training.optim import OptimConfig, build_optimizer, parameter_groups
from tests.factories import tiny_swin


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_biases_and_norms_are_not_decayed():
    decayed, undecayed = parameter_groups(_Module(), OptimConfig())
    assert (decayed["names"], decayed["weight_decay"]) == (["token", "linear.weight"], 0.05)
    assert (undecayed["names"], undecayed["weight_decay"]) == (["linear.bias", "norm.weight", "norm.bias"], 0.0)
    assert decayed["lr_scale"] == undecayed["lr_scale"] == 1.0


def test_the_optimiser_decays_what_it_should():
    module = _Module()
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.linear.weight, torch.full((4, 3), 0.95))  # 1 - lr x decay
    torch.testing.assert_close(module.norm.weight, torch.ones(4))


class _ThreeBlocks(nn.Module):
    """An Encoder in the names and depths of its parameters, which is all that an optimiser asks."""

    image_size, in_channels, strides, channels, group_isolation, num_blocks = (32, 32), 3, (32,), (2,), "none", 3
    cell_px, fill_dim = 32, 2

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 1))  # as if of the second block

    def features(self, images, group_map=None, fill=None):
        raise NotImplementedError

    def final(self, feature, group_map=None):
        raise NotImplementedError

    def parameter_depths(self):
        blocks = {f"blocks.{i}.{kind}": i + 1 for i in range(3) for kind in ("weight", "bias")}
        return {"stem.weight": 0, "stem.bias": 0, "relative_position_bias_table": 2} | blocks


@pytest.mark.parametrize(
    ("rule", "scales", "table_decay"),
    [
        # Half the rate for each block downwards; 3 blocks, so the exponents are 4 - depth.
        ("official", {"stem": 0.0625, "blocks.0": 0.125, "blocks.1": 0.25, "blocks.2": 0.5, "head": 0.5}, 0.05),
        ("timm", {"stem": 0.0625, "blocks.0": 0.125, "blocks.1": 0.25, "blocks.2": 0.5, "head": 1.0}, 0.0),
    ],
)
def test_layer_decay_of_three_blocks(rule, scales, table_decay):
    model = ImageClassifier(_ThreeBlocks(), 5)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, layer_decay_rule=rule))
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    expected = {}
    for part, scale in scales.items():
        prefix = part if part == "head" else f"encoder.{part}"
        expected |= {f"{prefix}.weight": (scale, 0.05), f"{prefix}.bias": (scale, 0.0)}
    assert found == expected | {"encoder.relative_position_bias_table": (0.25, table_decay)}


def test_groups_hold_every_trainable_parameter_once():
    model = ImageClassifier(tiny_swin(), 10)
    for parameter in model.encoder.patch_embed.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.7))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    by_name = dict(model.named_parameters())
    for group in groups:
        assert all(by_name[name] is p for name, p in zip(group["names"], group["params"], strict=True))


def test_layer_decay_needs_an_encoder():
    with pytest.raises(ValueError, match="needs a model on an encoder"):
        build_optimizer(_Module(), OptimConfig(layer_decay=0.7))


def test_lars_takes_the_first_beta():
    module = _Module()
    optimizer = build_optimizer(module, OptimConfig(optimizer="lars", weight_decay=0.0, betas=(0.8, 0.95)))
    assert isinstance(optimizer, Lars)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.8]


def test_peak_rate_scales_with_the_batch():
    assert OptimConfig(base_lr=1.5e-4).peak_lr(1024) == pytest.approx(6e-4)
    assert OptimConfig(base_lr=1.5e-4, lr=8e-5).peak_lr(1024) == 8e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_lr", 0.0),
        ("lr", 0.0),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)),
        ("clip_grad_norm", 0.0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
    ],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
