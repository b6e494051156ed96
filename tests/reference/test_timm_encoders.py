"""timm's ViT, Swin and ResNet v2 on random weights: the same numbers, to 1e-5 of the largest, and the same counts."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import GroupNormAct, StdConv2d
from timm.models import group_parameters
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from mixmae.convert import to_ours, to_timm_resnetv2
from mixmae.encoders.base import head_depth
from mixmae.encoders.resnetv2 import (
    WEIGHT_EPS,
    ResNetV2Config,
    ResNetV2Encoder,
    resnetv2_50x3,
    resnetv2_101x3,
)
from mixmae.encoders.swin import SwinConfig, SwinEncoder, swin_base_w7, swin_large_w7
from mixmae.encoders.vit import ViTConfig, ViTEncoder, vit_base, vit_large, vit_small, vit_tiny
from mixmae.finetune.classification import ImageClassifier
from tests.factories import noise_images, seeded

RTOL = 1e-5


def assert_close(ours, theirs):
    """Within RTOL of the largest of their values."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= RTOL * theirs.abs().max()


def randomise(model):
    """Draw every parameter anew: fresh norms, biases and tables of zeros and ones would hide mistakes."""
    model.eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            draw = torch.randn(parameter.shape, generator=seeded(index))
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * draw if is_scale else 0.2 * draw)
    return model


def take_weights(model, theirs):
    """Copy timm's parameters, all of which must fit; positions come along where timm has them."""
    model.load_state_dict(to_ours(theirs.state_dict()), strict=True)
    return model.eval()


def timm_vit(class_token, image_size=64):
    return randomise(
        VisionTransformer(
            img_size=image_size, patch_size=16, embed_dim=32, depth=3, num_heads=4, num_classes=0, global_pool="",
            class_token=class_token,
        )
    )  # fmt: skip


@pytest.fixture(params=[False, True], ids=["plain", "class-token"])
def vit_pair(request):
    """Ours and timm's; timm learns its positions, so it gets ours."""
    theirs = timm_vit(request.param)
    encoder = ViTEncoder(ViTConfig(image_size=64, embed_dim=32, depth=3, num_heads=4, class_token=request.param))
    with torch.no_grad():
        theirs.pos_embed.zero_()
        theirs.pos_embed[:, -encoder.pos_embed.shape[1] :] = encoder.pos_embed
    positions = encoder.pos_embed
    weights = {name: value for name, value in theirs.state_dict().items() if name != "pos_embed"}
    encoder.load_state_dict(weights | {"pos_embed": positions}, strict=True)
    return encoder.eval(), theirs


def test_vit(vit_pair):
    encoder, theirs = vit_pair
    images = noise_images(2, (64, 64))
    with torch.no_grad():
        tokens, expected = encoder(images), theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        assert_close(tokens, expected)
        assert_close(encoder.final(encoder.features(images)[0]), expected)


def test_vit_on_visible_tokens(vit_pair):
    """MAE's encoder, spelled out with timm's modules."""
    encoder, theirs = vit_pair
    images = noise_images(2, (64, 64))
    visible = torch.stack([torch.randperm(16, generator=seeded(b))[:5] for b in range(2)])
    with torch.no_grad():
        embedded = theirs.patch_embed(images) + theirs.pos_embed[:, theirs.num_prefix_tokens :]
        kept = torch.stack([embedded[b, visible[b]] for b in range(2)])
        if theirs.num_prefix_tokens:
            kept = torch.cat([theirs.cls_token.expand(2, -1, -1), kept], dim=1)
        expected = theirs.norm(theirs.blocks(kept))[:, theirs.num_prefix_tokens :]
        assert_close(encoder.encode_visible(images, visible), expected)


@pytest.mark.parametrize(
    ("image_size", "window"),
    [((224, 224), 7), ((128, 128), 4), ((256, 128), 4), ((64, 192), 2)],
    ids=["7", "4", "one-axis", "2"],
)
def test_swin_with_shifts(image_size, window):
    """Stages with several windows down and across, with one alone (no shift), and with one on one side."""
    depths, num_heads = (2, 3, 2, 2), (1, 2, 4, 8)
    theirs = randomise(
        SwinTransformer(
            img_size=image_size, embed_dim=16, depths=depths, num_heads=num_heads, window_size=window,
            always_partition=False, num_classes=5,
        )
    )  # fmt: skip
    config = SwinConfig(
        image_size=image_size,
        embed_dim=16,
        depths=depths,
        num_heads=num_heads,
        window_sizes=(window,) * 4,
        shift=True,
        absolute_positions=False,
    )
    model = take_weights(ImageClassifier(SwinEncoder(config), 5), theirs)
    encoder = model.encoder
    images = noise_images(1, image_size)
    with torch.no_grad():
        last, stages = theirs.forward_intermediates(images, norm=False)
        for ours, expected in zip(encoder.features(images), stages, strict=True):
            assert_close(ours, expected)
        assert_close(encoder(images), last.flatten(1, 2))
        assert_close(model(images), theirs(images))


@pytest.mark.parametrize("size", [(96, 96), (64, 160)])
def test_resnetv2(size):
    theirs = randomise(
        ResNetV2(
            layers=(2, 1, 2, 1), channels=(32, 64, 128, 256), stem_chs=8, num_classes=5, stem_type="fixed",
            conv_layer=partial(StdConv2d, eps=WEIGHT_EPS), norm_layer=partial(GroupNormAct, num_groups=4),
        )
    )  # fmt: skip
    config = ResNetV2Config(stem_dim=8, depths=(2, 1, 2, 1), num_norm_groups=4)
    model = take_weights(ImageClassifier(ResNetV2Encoder(config), 5), theirs)
    encoder = model.encoder
    back, state = to_timm_resnetv2(model.state_dict()), theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    images = noise_images(2, size)
    with torch.no_grad():
        assert_close(encoder.stem(images, None), theirs.stem(images))
        last, stages = theirs.forward_intermediates(images, indices=4)
        for ours, expected in zip(encoder.features(images), stages, strict=True):
            assert_close(ours, expected)
        assert_close(encoder(images), last.flatten(2).transpose(1, 2))
        assert_close(model(images), theirs(images))


@pytest.mark.parametrize(
    ("build", "name", "millions"),
    [
        (lambda: ViTEncoder(vit_tiny()), "vit_tiny_patch16_224", 5.5),
        (lambda: ViTEncoder(vit_small()), "vit_small_patch16_224", 21.6),
        (lambda: ViTEncoder(vit_base()), "vit_base_patch16_224", 85.6),
        (lambda: ViTEncoder(vit_large()), "vit_large_patch16_224", 303.1),
        (lambda: SwinEncoder(swin_base_w7()), "swin_base_patch4_window7_224", 86.7),
        (lambda: SwinEncoder(swin_large_w7()), "swin_large_patch4_window7_224", 195.0),
        (lambda: ResNetV2Encoder(resnetv2_50x3()), "resnetv2_50x3_bit", 211.2),
        (lambda: ResNetV2Encoder(resnetv2_101x3()), "resnetv2_101x3_bit", 381.8),
    ],
)
def test_sizes_are_those_of_timm(build, name, millions):
    """Without head, position table and class token."""
    with torch.device("meta"):
        encoder, theirs = build(), timm.create_model(name, pretrained=False, num_classes=0)
    ours = sum(p.numel() for p in encoder.parameters())
    assert ours == sum(p.numel() for name, p in theirs.named_parameters() if name not in ("pos_embed", "cls_token"))
    assert round(ours / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ViTEncoder(ViTConfig(class_token=True)), "vit_base_patch16_224"),
        (lambda: ResNetV2Encoder(resnetv2_50x3()), "resnetv2_50x3_bit"),
    ],
)
def test_layer_decay_is_that_of_timm(build, name):
    """Swin's is in test_official_mixmim.py."""
    with torch.device("meta"):
        encoder, theirs = build(), timm.create_model(name, pretrained=False)
    groups = group_parameters(theirs, theirs.group_matcher(coarse=False), reverse=True)
    ours = encoder.parameter_depths() | {
        name: head_depth(encoder, "timm") for name in groups if name.startswith("head")
    }
    assert ours == {name: depth for name, depth in groups.items() if name != "pos_embed"}
