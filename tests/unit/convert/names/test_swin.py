"""Swins of timm, Microsoft and SimMIM give the numbers of timm."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch.nn import functional as F

from mixmae.convert import (
    detect_format,
    load_pretrained,
    load_weights,
    read_architecture,
    to_ours,
)
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.patches import unpatchify
from tests.factories import noise_images


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
