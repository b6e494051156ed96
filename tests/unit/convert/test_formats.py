"""Names there and back, formats told apart, architectures read off shapes. The originals' numbers are in reference/."""

import dataclasses

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from mixmae.convert import (
    build_model,
    config_from_mae,
    config_from_mmpretrain,
    config_from_official,
    describe,
    detect_format,
    from_mae,
    from_mmpretrain,
    from_official,
    load_encoder,
    load_pretrained,
    load_weights,
    read_architecture,
    read_weights,
    to_mmpretrain,
    to_official,
    to_ours,
)
from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import SIZES, build_encoder
from mixmae.encoders.swin import SwinConfig, SwinEncoder, swin_base
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.patches import unpatchify
from tests.factories import (
    noise_images,
    tiny_mixmae,
    tiny_pcpvt,
    tiny_pvt,
    tiny_pvt_v2,
    tiny_resnetv2,
    tiny_svt,
    tiny_swin,
    tiny_vit,
)

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
    return names | {
        "encoder.mask_token": torch.randn(1, 1, 16),
        "decoder.0.weight": torch.randn(3072, 128, 1, 1),
        "decoder.0.bias": torch.randn(3072),
    }


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
    rest = ("mask_token", "decoder.pred.weight", "decoder.pred.bias")
    assert report.unexpected == (rest if name == "simmim_swin" else ())
    images = noise_images(2, (64, 64))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images).unflatten(1, (2, 2)), theirs.forward_features(images), rtol=1e-5, atol=1e-5
        )
        if not head:
            torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rename", "name"), [(dict, "timm_swin"), (microsoft_names, "microsoft_swin"), (simmim_names, "simmim_swin")]
)
def test_swin_with_shifts_gives_the_numbers_of_timm(rename, name):
    torch.manual_seed(0)
    theirs = SwinTransformer(
        img_size=224, window_size=7, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=10
    ).eval()
    state = to_ours(rename(theirs.state_dict()))
    found = read_architecture(state)
    assert (found.encoder.shift, found.encoder.absolute_positions) == (True, False)
    assert found.encoder.window_sizes == (7, 7, 7, 7)
    encoder = SwinEncoder(found.encoder).eval()
    report = load_weights(encoder, {name.removeprefix("encoder."): value for name, value in state.items()})
    assert report.matched_share == 1.0
    assert found.decoder is None
    images = noise_images(2, (224, 224))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images).unflatten(1, (7, 7)), theirs.forward_features(images), rtol=1e-4, atol=1e-5
        )


def test_simmim_predicts_what_a_convolution_and_a_pixel_shuffle_do(tmp_path):
    """SimMIM's decoder, spelled out: a 1 x 1 convolution to 3 * 32 * 32 channels, which are shuffled to 32 x 32 px."""
    state = simmim_names(timm_swin().state_dict())
    torch.save({"model": state}, tmp_path / "simmim.pth")
    config = read_architecture(to_ours(state), image_size=64).encoder
    model = SimMIM(SwinEncoder(config), SimMIMConfig()).eval()
    report = load_pretrained(model, tmp_path / "simmim.pth")
    assert report.matched_share == 1.0
    assert report.unexpected == ()
    assert torch.equal(model.mask_token, state["encoder.mask_token"][0, 0])
    images, mask = noise_images(2, (64, 128)), torch.tensor([[[True, False, False, True], [False, True, False, True]]])
    with torch.no_grad():
        tokens = model.encode(images, mask.expand(2, -1, -1))  # (2, 8, 128)
        grid = tokens.transpose(1, 2).unflatten(2, (2, 4))
        channels = F.conv2d(grid, state["decoder.0.weight"], state["decoder.0.bias"])
        expected = F.pixel_shuffle(channels, 32)
        torch.testing.assert_close(unpatchify(model.decoder(tokens), 32, (2, 4)), expected, rtol=1e-5, atol=1e-4)


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
    assert "head.weight" not in ours  # it reads the class token
    assert torch.equal(ours["decoder.pos_embed"], state["decoder_pos_embed"][:, 1:])
    assert torch.equal(ours["decoder.blocks.0.norm1.weight"], state["decoder_blocks.0.norm1.weight"])
    assert torch.equal(ours["decoder.mask_token"], state["mask_token"])
    bare = {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}
    again = from_mae(bare)  # without a position of a class token
    assert all(torch.equal(again[f"encoder.{name}"], value) for name, value in bare.items())


@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_our_own_vit_alone(size):
    bare = tiny_vit(size, class_token=True).state_dict()
    ours = to_ours(bare)
    assert ours.keys() == {f"encoder.{name}" for name in bare}
    assert all(torch.equal(ours[f"encoder.{name}"], value) for name, value in bare.items())


@pytest.mark.parametrize("kind", ["class token", "no class token", "no position of the class token"])
def test_a_vit_of_timm_gives_its_numbers(tmp_path, kind):
    """Its positions are learned, that of the class token too."""
    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=7, fc_norm=False,
        class_token=kind != "no class token", no_embed_class="position" in kind,
        global_pool="avg" if kind == "no class token" else "token",
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    weights = read_weights(tmp_path / "vit.pth")
    model, metadata = build_model(weights, "vit.pth")
    expected = ViTConfig(
        image_size=64, embed_dim=192, depth=2, num_heads=3, class_token=kind != "no class token"
    )  # fmt: skip
    assert metadata.encoder == expected
    images = noise_images(2, (64, 64))
    with torch.no_grad():
        tokens = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(getattr(model, "encoder", model)(images), tokens, rtol=1e-5, atol=1e-5)
        if kind == "no class token":
            torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
        else:
            assert metadata.num_classes is None


def test_a_whole_mae():
    """With MAE's names: the pretraining model, its decoder's size and the class token's position of zeros."""
    config = ViTConfig(image_size=64, embed_dim=192, depth=2, num_heads=3, class_token=True)
    decoder = DecoderConfig(dim=32, depth=1, num_heads=4, norm_eps=1e-6)
    ours = MAE(ViTEncoder(config), MAEConfig(decoder=decoder)).state_dict()
    theirs = {}
    for name, value in ours.items():
        if name.endswith("pos_embed"):
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        name = name.removeprefix("encoder.").replace("decoder.", "decoder_")
        theirs[name.replace("decoder_mask_token", "mask_token")] = value
    assert detect_format(theirs) == "mae"
    returned = from_mae(theirs)
    assert returned.keys() == ours.keys()
    assert all(torch.equal(returned[name], value) for name, value in ours.items())
    found = config_from_mae(theirs, decoder_num_heads=4)
    assert (found.encoder, found.decoder) == (config, decoder)
    huge = {"patch_embed.proj.weight": torch.zeros(192, 3, 14, 14), "pos_embed": torch.zeros(1, 257, 192)}
    with pytest.raises(ValueError, match="patch_px must divide 32, the mask cell, got 14"):
        config_from_mae(theirs | huge)


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


def published_pvt(encoder):
    """The names of PVT's authors, from ours: numbered parts, flat tables, a class token in stage 4 of v1."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name.startswith("stages."):
            _, stage, kind, *rest = name.split(".")
            renamed = {"blocks": "block"}.get(kind, kind)
            name = ".".join([f"{renamed}{int(stage) + 1}", *rest]).replace(".dwconv.", ".dwconv.dwconv.")
        state[name] = value.flatten(1, 2) if name.startswith("pos_embed") else value
    if "pos_embed4" in state:
        state["pos_embed4"] = torch.cat([torch.ones(1, 1, 32), state["pos_embed4"]], dim=1)
        state["cls_token"] = torch.ones(1, 1, 32)
    return state | {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}


@pytest.mark.parametrize("build", [tiny_pvt, tiny_pvt_v2])
def test_pvt_of_its_authors(build):
    encoder = build()
    state = published_pvt(encoder)
    assert detect_format(state) == "pvt"
    assert f"block3.1.{'mlp.dwconv.dwconv' if build is tiny_pvt_v2 else 'attn.kv'}.weight" in state
    ours = to_ours(state)
    classes = {name: ours.pop(name) for name in list(ours) if name.startswith("head.")}
    assert bool(classes) == (build is tiny_pvt_v2)  # that of v1 reads the class token
    expected = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (to_official(tiny_mixmae().state_dict()), "mixmim"),
        (to_mmpretrain(tiny_mixmae().state_dict()), "mmpretrain"),
        (tiny_mixmae().state_dict(), "mixmae"),
        (tiny_swin().state_dict(), "encoder"),
        (tiny_pvt_v2().state_dict(), "encoder"),
        (tiny_svt().state_dict(), "encoder"),
        (tiny_vit().state_dict(), "mae"),
        (tiny_resnetv2().state_dict(), "timm_resnetv2"),
    ],
)
def test_formats_are_detected(state, name):
    assert detect_format(state) == name


def test_unknown_formats_get_a_list_of_the_known():
    # Of the ResNets v2 only BiT's are ours: the others have batch norms, and would give other numbers unnoticed.
    with torch.device("meta"), pytest.raises(ValueError, match="in no known format"):
        detect_format(timm.create_model("resnetv2_50").state_dict())
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
