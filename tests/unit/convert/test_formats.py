"""Names there and back, formats told apart, architectures read off shapes. The originals' numbers are in reference/."""

import dataclasses

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from mixmae.convert import (
    config_from_mmpretrain,
    config_from_official,
    describe,
    detect_format,
    from_mae,
    from_mmpretrain,
    from_official,
    load_weights,
    read_architecture,
    to_mmpretrain,
    to_official,
    to_ours,
)
from mixmae.encoders.swin import SwinConfig, SwinEncoder, swin_base
from mixmae.finetune.classification import ImageClassifier
from tests.factories import noise_images, tiny_mixmae, tiny_swin

MODELS = pytest.mark.parametrize(
    "model", [tiny_mixmae(), ImageClassifier(tiny_swin(), 10)], ids=["pretraining", "finetuning"]
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


def test_merged_channels_of_mmpretrain():
    """Two channels, a hand-worked permutation: channel by channel in row order, to token by token in column order."""
    name = "backbone.layers.0.downsample.norm.weight"
    theirs = to_mmpretrain(tiny_mixmae().state_dict())
    theirs[name] = torch.arange(
        8
    )  # channel 0: upper left 0, upper right 1, lower left 2, lower right 3; channel 1: 4..7
    ours = from_mmpretrain(theirs)["encoder.stages.1.downsample.norm.weight"]
    assert ours.tolist() == [0, 4, 2, 6, 1, 5, 3, 7]  # upper left, lower left, upper right, lower right


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


def timm_swin():
    """A timm Swin whose windows cover the grid at every stage, so that it has no shifts: 16, 8, 4 and 2 tokens."""
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=64, window_size=16, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10
    )


def microsoft_names(state):
    """timm's names to Microsoft's: the downsampling at the end of a stage, a plain head."""
    renamed = {name.replace("head.fc.", "head."): value for name, value in state.items()}
    for stage in (1, 2, 3):
        for name in [name for name in renamed if name.startswith(f"layers.{stage}.downsample.")]:
            renamed[name.replace(f"layers.{stage}", f"layers.{stage - 1}")] = renamed.pop(name)
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, dtype=torch.int64)
    return renamed


def simmim_names(state):
    names = {f"encoder.{name}": value for name, value in microsoft_names(state).items() if not name.startswith("head.")}
    return names | {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.weight": torch.zeros(3072, 128, 1, 1)}


@pytest.mark.parametrize(
    ("rename", "name"), [(dict, "timm_swin"), (microsoft_names, "microsoft_swin"), (simmim_names, "simmim_swin")]
)
def test_plain_swin_without_shifts_gives_the_numbers_of_timm(rename, name):
    theirs = timm_swin().eval()
    state = rename(theirs.state_dict())
    assert detect_format(state) == name
    encoder = SwinEncoder(
        SwinConfig(image_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=(16, 8, 4, 2))
    )
    encoder.pos_embed.zero_()  # a plain Swin has no absolute positions
    model = ImageClassifier(encoder, 10).eval()
    report = load_weights(model, to_ours(state))
    head = ("head.weight", "head.bias") if name == "simmim_swin" else ()
    assert set(report.missing) == {*head, "encoder.pos_embed"}
    assert report.mismatched == ()
    assert report.unexpected == (("decoder.0.weight", "mask_token") if name == "simmim_swin" else ())
    images = noise_images(2, (64, 64))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images).unflatten(1, (2, 2)), theirs.forward_features(images), rtol=1e-5, atol=1e-5
        )
        if not head:
            torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    "shift" not in {field.name for field in dataclasses.fields(SwinConfig)}, reason="SwinConfig has no shift yet"
)
@pytest.mark.parametrize(
    ("rename", "name"), [(dict, "timm_swin"), (microsoft_names, "microsoft_swin"), (simmim_names, "simmim_swin")]
)
def test_swin_with_shifts_gives_the_numbers_of_timm(rename, name):
    torch.manual_seed(0)
    theirs = SwinTransformer(
        img_size=224, window_size=7, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=10
    ).eval()
    state = to_ours(rename(theirs.state_dict()))
    found = read_architecture({name: value for name, value in state.items() if not name.startswith("decoder.")})
    assert (found.encoder.shift, found.encoder.absolute_positions) == (True, False)
    assert found.encoder.window_sizes == (7, 7, 7, 7)
    encoder = SwinEncoder(found.encoder).eval()
    report = load_weights(encoder, {name.removeprefix("encoder."): value for name, value in state.items()})
    assert report.matched_share == 1.0
    images = noise_images(2, (224, 224))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images).unflatten(1, (7, 7)), theirs.forward_features(images), rtol=1e-4, atol=1e-5
        )


def vit_state():
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=7).state_dict()


def test_vit_of_mae():
    state = vit_state()
    state |= {
        "mask_token": torch.rand(1, 1, 8),
        "decoder_embed.weight": torch.rand(8, 32),
        "decoder_pos_embed": torch.rand(1, 17, 8),
        "decoder_blocks.0.norm1.weight": torch.rand(8),
    }
    assert detect_format(state) == "mae"
    ours = from_mae(state)
    assert torch.equal(ours["encoder.pos_embed"], state["pos_embed"][:, 1:])
    assert torch.equal(ours["encoder.cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(ours["encoder.blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert torch.equal(ours["head.weight"], state["head.weight"])
    assert torch.equal(ours["decoder.pos_embed"], state["decoder_pos_embed"][:, 1:])
    assert torch.equal(ours["decoder.blocks.0.norm1.weight"], state["decoder_blocks.0.norm1.weight"])
    assert torch.equal(ours["decoder.mask_token"], state["mask_token"])
    bare = {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}
    again = from_mae(bare)  # our own encoder alone: its table has no position of a class token
    assert all(torch.equal(again[f"encoder.{name}"], value) for name, value in bare.items())


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (to_official(tiny_mixmae().state_dict()), "mixmim"),
        (to_mmpretrain(tiny_mixmae().state_dict()), "mmpretrain"),
        (tiny_mixmae().state_dict(), "mixmae"),
        (tiny_swin().state_dict(), "encoder"),
    ],
)
def test_formats_are_detected(state, name):
    assert detect_format(state) == name


def test_unknown_formats_get_a_list_of_the_known():
    state = timm.create_model("resnet10t").state_dict()
    with pytest.raises(ValueError, match=r"they start with conv1.*known are: official MixMIM, .*SimMIM.*MAE"):
        detect_format(state)
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        from_official(tiny_mixmae().state_dict())
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        config_from_official({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a MixMIM model of mmpretrain"):
        from_mmpretrain(tiny_mixmae().state_dict())


def test_architectures_in_words():
    with torch.device("meta"):
        base = ImageClassifier(SwinEncoder(swin_base()), 10).state_dict()
    assert describe(base) == "a Swin of width 128 with 2-2-18-2 blocks (swin_base)"
    assert describe(tiny_mixmae().state_dict()) == "a Swin of width 16 with 1-1-2-1 blocks"
    assert describe(from_mae(vit_state())) == "a ViT of width 32 with 2 blocks"
