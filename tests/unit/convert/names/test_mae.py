"""ViTs of MAE and timm, and our own."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mixmae.convert import (
    build_model,
    config_from_mae,
    detect_format,
    from_mae,
    read_weights,
    to_ours,
)
from mixmae.decoders import DecoderConfig
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.methods.mae import MAE, MAEConfig
from tests.factories import noise_images, tiny_vit


def test_vit_of_mae(vit_state):
    state = vit_state | {
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
    huge["decoder_pred.weight"] = torch.zeros(3 * 14 * 14, 32)
    found = config_from_mae(theirs | huge, decoder_num_heads=4).encoder
    assert (found.image_size, found.patch_px) == (224, 14)  # as MAE's ViT-H
