"""PVT v2 and Twins against timm's models: numbers to 1e-5 in float32, and parameter counts. Needs no download."""

import pytest
import timm
import torch
from torch import nn

from mixmae.convert import (
    detect_format,
    from_timm_pvt_v2,
    from_twins,
    load_pretrained,
    to_ours,
    to_timm_pvt_v2,
    to_twins,
)
from mixmae.encoders import pvt, twins
from mixmae.encoders.pvt import PvtConfig, PvtEncoder
from mixmae.encoders.twins import TwinsConfig, TwinsEncoder
from mixmae.finetune.classification import ImageClassifier
from tests.factories import TINY_PYRAMID, noise_images


def our_names(content):
    """Names of timm's parts or weights to ours, those of an encoder alone."""
    from_timm = from_twins if any(name.startswith("patch_embeds.") for name in content) else from_timm_pvt_v2
    return {name.removeprefix("encoder."): value for name, value in from_timm(content).items()}


def tiny_pair(kind, size):
    """Build timm's model and ours with one set of weights, all of them random: no bias is zero and no norm is one."""
    torch.manual_seed(0)
    ours = (
        PvtEncoder(PvtConfig(version=2, image_size=size, **TINY_PYRAMID))
        if kind == "pvt_v2_b0"
        else TwinsEncoder(
            TwinsConfig(
                image_size=size, window_sizes=(7, 7, 7, 7) if kind == "twins_svt_small" else None, **TINY_PYRAMID
            )
        )
    )
    fixed_size = {} if kind == "pvt_v2_b0" else {"img_size": size}
    theirs = timm.create_model(kind, pretrained=False, num_classes=0, **fixed_size, **TINY_PYRAMID)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(our_names(theirs.state_dict()))
    return ours.eval(), theirs.eval()


# 224 px is the size at which windows of 7 need no padding, which timm lets tokens read.
PAIRS = pytest.mark.parametrize(
    ("kind", "size"), [("pvt_v2_b0", (96, 160)), ("twins_pcpvt_small", (96, 160)), ("twins_svt_small", (224, 224))]
)


@PAIRS
def test_features_and_tokens_are_those_of_timm(kind, size):
    ours, theirs = tiny_pair(kind, size)
    images = noise_images(2, size)
    with torch.no_grad():
        for feature, expected in zip(
            ours.features(images), theirs.forward_intermediates(images, intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(images).mean(dim=1), theirs(images), rtol=1e-5, atol=1e-5)


@PAIRS
def test_norms_have_the_same_eps(kind, size):
    """Too small a thing for the numbers above to show."""
    ours, theirs = (
        {f"{name}.": part.eps for name, part in model.named_modules() if isinstance(part, nn.LayerNorm)}
        for model in tiny_pair(kind, size)
    )
    assert ours == our_names(theirs)
    assert set(ours.values()) == {1e-5, 1e-6}


@PAIRS
def test_files_of_timm_are_read_and_written(tmp_path, kind, size):
    """A classifier: its logits too are timm's."""
    torch.manual_seed(0)
    ours = ImageClassifier(tiny_pair(kind, size)[0], 7).eval()
    fixed_size = {} if kind == "pvt_v2_b0" else {"img_size": size}
    theirs = timm.create_model(kind, pretrained=False, num_classes=7, **fixed_size, **TINY_PYRAMID).eval()
    state = theirs.state_dict()
    torch.save(state, tmp_path / "timm.pth")
    assert detect_format(state) == ("timm_pvt_v2" if kind == "pvt_v2_b0" else "twins")
    report = load_pretrained(ours, tmp_path / "timm.pth")
    assert report.matched_share == 1.0
    assert report.unexpected == ()
    images = noise_images(2, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    back = (to_timm_pvt_v2 if kind == "pvt_v2_b0" else to_twins)(to_ours(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "name",
    [f"pvt_v2_b{size}" for size in range(6)]
    + [f"twins_{kind}_{size}" for kind in ("pcpvt", "svt") for size in ("small", "base", "large")],
)
def test_known_sizes_have_the_names_and_shapes_of_timm(name):
    with torch.device("meta"):
        ours = PvtEncoder(getattr(pvt, name)()) if name in vars(pvt) else TwinsEncoder(getattr(twins, name)())
        theirs = timm.create_model(name, pretrained=False, num_classes=0)
    expected = {key: value.shape for key, value in our_names(theirs.state_dict()).items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
