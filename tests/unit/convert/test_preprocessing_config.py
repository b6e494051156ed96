"""The preprocessing of foreign weights is that of a config of timm or Hugging Face beside them."""

import json

import pytest
from safetensors.torch import save_file

from mixmae.convert import Preprocessing, load_encoder, save_encoder, to_official
from mixmae.convert.exported import read_export
from mixmae.convert.hub import write_hub
from mixmae.convert.preprocessing_config import read_preprocessing
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.inference import load_frozen
from mixmae.pixels import usual_normalisation
from tests.factories import tiny_swin

HALF = (0.5, 0.5, 0.5)
TIMM = {"input_size": [3, 96, 96], "interpolation": "bilinear", "crop_pct": 0.9, "mean": HALF, "std": HALF}
TIMM_FIELDS = {"image_size": (96, 96), "interpolation": "bilinear", "crop_pct": 0.9, "mean": HALF, "std": HALF}
FACE = {"image_mean": HALF, "image_std": HALF, "resample": 2, "size": {"height": 96, "width": 64}}
FACE_FIELDS = {"image_size": (96, 64), "crop_pct": 1.0, "interpolation": "bilinear", "mean": HALF, "std": HALF}

CONFIGS = {
    "timm": ("config.json", {"architecture": "swin", "pretrained_cfg": TIMM}, TIMM_FIELDS),
    "early timm": ("config.json", {"architecture": "swin", **TIMM}, TIMM_FIELDS),
    "Hugging Face": ("preprocessor_config.json", FACE, FACE_FIELDS),
    "side": ("preprocessor_config.json", {"size": 96}, {"image_size": (96, 96), "crop_pct": 1.0}),
    "crop": (
        "preprocessor_config.json",
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
        {"image_size": (224, 224), "crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    "no crop": (
        "preprocessor_config.json",
        {"size": 256, "crop_size": 224, "do_center_crop": False},
        {"image_size": (256, 256), "crop_pct": 1.0},
    ),
    "crop_pct": (
        "preprocessor_config.json",
        {"size": {"shortest_edge": 224}, "crop_pct": 0.9},
        {"image_size": (224, 224), "crop_pct": 0.9},
    ),
    "not normalised": ("preprocessor_config.json", {"do_normalize": False}, {"mean": (0.0,), "std": (1.0,)}),
    "another scale": (  # pixels * 2 / 255, minus 1: (x - 0.5) / 0.5 for x in 0..1
        "preprocessor_config.json",
        {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5},
        {"mean": HALF, "std": HALF},
    ),
    "of transformers": ("config.json", {"model_type": "vit", "image_size": 224}, {}),
    "another program's": ("config.json", {"input_size": 64, "size": 7, "mean": "auto"}, {}),
    "a list": ("config.json", [1, 2], {}),
    "nothing pretrained": ("config.json", {"architecture": "swin", "pretrained_cfg": None}, {}),
}


@pytest.mark.parametrize(("name", "content", "fields"), CONFIGS.values(), ids=CONFIGS)
def test_fields(tmp_path, capsys, name, content, fields):
    (tmp_path / name).write_text(json.dumps(content))
    assert read_preprocessing(tmp_path) == fields
    assert (f"the preprocessing is that of {tmp_path / name}" in capsys.readouterr().out) == bool(fields)


def test_weights_get_it(tmp_path):
    save_file(to_official(tiny_swin().state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "swin", "pretrained_cfg": TIMM}))
    expected = Preprocessing(**TIMM_FIELDS)
    assert load_encoder(tmp_path)[1].preprocessing == expected
    frozen = load_frozen(tmp_path, device="cpu")
    assert (frozen.crop_pct, frozen.preprocessing) == (0.9, expected)
    assert load_frozen(tmp_path, device="cpu", crop_pct=1.0).crop_pct == 1.0


def test_our_own_files_keep_theirs(tmp_path):
    own = Preprocessing(image_size=(96, 96), mean=(0.1,) * 3)
    save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), own)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "swin", "pretrained_cfg": TIMM}))
    assert load_encoder(tmp_path)[1].preprocessing == own


def test_the_input_size_where_shapes_do_not_tell_it(tmp_path):
    """That of a table that is not square, and of an encoder without one; a square table knows better."""
    wide = SwinConfig(image_size=(64, 96), embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    config = tmp_path / "config.json"
    for fields, said, expected in (
        ({}, [3, 64, 96], (64, 96)),
        ({"absolute_positions": False}, [3, 384, 384], (384, 384)),
        ({"image_size": 96}, [3, 64, 64], (96, 96)),
    ):
        encoder = SwinEncoder(SwinConfig(**{**vars(wide), **fields}))
        save_file(encoder.state_dict(), tmp_path / "model.safetensors")
        config.write_text(json.dumps({"architecture": "swin", "pretrained_cfg": {"input_size": said}}))
        assert load_encoder(tmp_path)[1].preprocessing.image_size == expected


def test_a_normalisation_for_other_channels_is_not_taken(tmp_path):
    save_file(tiny_swin(in_channels=1).state_dict(), tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "swin", "pretrained_cfg": TIMM}))
    assert load_encoder(tmp_path)[1].preprocessing.mean == (0.5,)
    config.write_text(json.dumps({"architecture": "swin", "pretrained_cfg": {**TIMM, "mean": [0.1, 0.2, 0.3]}}))
    preprocessing = load_encoder(tmp_path)[1].preprocessing
    assert (preprocessing.mean, preprocessing.std) == usual_normalisation(1)


@pytest.mark.parametrize("content", ["{", '{"architecture": "swin", "pretrained_cfg": {"input_size": 224}}'])
def test_damaged_configs(tmp_path, content):
    save_file(tiny_swin().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json, beside the weights, is damaged .*move it away"):
        load_encoder(tmp_path)


def test_a_hub_folder_passes_it_on(tmp_path):
    (tmp_path / "theirs").mkdir()
    save_file(to_official(tiny_swin().state_dict()), tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"architecture": "swin", "pretrained_cfg": TIMM}))
    write_hub(read_export(tmp_path / "theirs"), tmp_path / "hub")
    assert load_encoder(tmp_path / "hub")[1].preprocessing == Preprocessing(**TIMM_FIELDS)
    assert read_preprocessing(tmp_path / "hub") == TIMM_FIELDS
