"""The weights that a run starts from: which architecture they bring along, and how they are fitted to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from mixmae.convert import Preprocessing, Weights, save_encoder, to_official
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import SwinConfig
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import FinetuneConfig, to_json
from mixmae.jobs.pretrained import keep_initial, read_pretrained
from mixmae.jobs.record import Pretrained, RunRecord
from mixmae.jobs.supervised import INITIAL_FILE
from mixmae.pixels import usual_normalisation
from pipelines.recipes import FINETUNE_RECIPES
from tests.factories import tiny_mixmae, tiny_swin, tiny_vit


def _read(recipe: str, path: Path, **fields: Any) -> tuple[Pretrained, Weights, FinetuneConfig]:
    """The weights, for a recipe with changed fields."""
    usual = FINETUNE_RECIPES[recipe]()
    return read_pretrained(path, replace(usual, **fields), usual, None)


def _initial_model(pretrained: Pretrained, weights: Weights, config: FinetuneConfig, folder: Path) -> nn.Module:
    keep_initial(pretrained, weights, config, folder)
    model = ImageClassifier(build_encoder(config.sized_encoder()), 20)
    model.load_state_dict(model.state_dict() | safetensors.torch.load_file(folder / INITIAL_FILE))
    return model


def test_the_file_says_the_encoder_and_the_recipe_the_rest(tmp_path, capsys):
    preprocessing = Preprocessing(image_size=(96, 96), mean=(0.1, 0.2, 0.3))
    for name, encoder in (("swin", tiny_swin()), ("vit", tiny_vit())):
        save_encoder(tmp_path / f"{name}.safetensors", encoder, preprocessing)
        pretrained, weights, config = _read("demo_finetune", tmp_path / f"{name}.safetensors")
        expected = replace(encoder.config, drop_path=0.0, image_size=config.augment.image_size)
        assert config.sized_encoder() == expected
        assert config.pixel_mean == (0.1, 0.2, 0.3)
        assert weights.metadata.encoder == encoder.config
        assert "note: the encoder is the one of" in capsys.readouterr().out
    torch.save({"model": to_official(tiny_mixmae(image_size=64).state_dict())}, tmp_path / "official.pth")
    pretrained, weights, config = _read("demo_finetune", tmp_path / "official.pth")
    assert config.encoder.embed_dim == 16
    model = _initial_model(pretrained, weights, config, tmp_path / "run")
    theirs = weights.state["encoder.stages.1.blocks.0.mlp.fc1.weight"]
    assert torch.equal(model.encoder.stages[1].blocks[0].mlp.fc1.weight, theirs)
    # What the command line says of the encoder, and of pixels, stays.
    own = SwinConfig(image_size=96, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=(3,) * 4)
    fields = {"encoder": own, "pixel_mean": (0.5, 0.5, 0.5)}
    _, _, config = _read("demo_finetune", tmp_path / "swin.safetensors", **fields)
    assert config.encoder == own
    assert config.pixel_mean == (0.5, 0.5, 0.5)


def test_channels_and_pixels_are_the_files_unless_the_command_line_asks_for_others(tmp_path):
    path = tmp_path / "grey.safetensors"
    save_encoder(path, tiny_swin(in_channels=1), Preprocessing(image_size=(96, 96), mean=(0.1,), std=(0.3,)))
    _, _, config = _read("demo_finetune", path)
    assert (config.encoder.in_channels, config.pixel_mean, config.pixel_std) == (1, (0.1,), (0.3,))
    own = tiny_swin(in_channels=1).config
    _, _, config = _read("demo_finetune", path, encoder=own)
    assert (config.encoder, config.pixel_mean) == (own, (0.1,))


@pytest.mark.parametrize("own", [True, False], ids=["another architecture", "the channels alone"])
def test_weights_are_adapted_to_the_channels_that_the_command_line_asks_for(tmp_path, capsys, own):
    path, made = tmp_path / "rgb.safetensors", tiny_swin()
    save_encoder(path, made, Preprocessing(image_size=(96, 96)))
    encoder = FINETUNE_RECIPES["demo_finetune"]().encoder
    encoder = tiny_swin(in_channels=1).config if own else replace(encoder, in_channels=1)
    pretrained, weights, config = _read("demo_finetune", path, encoder=encoder)
    said = capsys.readouterr().out
    assert "for images of 3 channels, and the encoder is for 1: their first layer is summed up" in said
    assert (config.encoder.in_channels, config.encoder.embed_dim) == (1, 16)
    assert (config.pixel_mean, config.pixel_std) == usual_normalisation(1)
    model = _initial_model(pretrained, weights, config, tmp_path / "run")
    assert torch.equal(model.encoder.patch_embed.proj.weight, made.patch_embed.proj.weight.sum(dim=1, keepdim=True))


def test_weights_for_channels_that_no_image_file_has_are_adapted(tmp_path, capsys):
    path, made = tmp_path / "bands.safetensors", tiny_swin(in_channels=13)
    save_encoder(path, made, Preprocessing(image_size=(96, 96), mean=(0.2,) * 13, std=(0.1,) * 13))
    _, weights, config = _read("demo_finetune", path)
    assert "for images of 13 channels, and the encoder is for 3" in capsys.readouterr().out
    assert (config.encoder.in_channels, config.pixel_mean, config.pixel_std) == (3, (0.2,) * 3, (0.1,) * 3)
    expected = made.patch_embed.proj.weight[:, :3] * 13 / 3
    torch.testing.assert_close(weights.state["encoder.patch_embed.proj.weight"], expected)


def test_another_set_of_the_same_file_is_other_weights(tmp_path):
    """A continued run has those that it was begun with; those under another key have another digest."""
    path, made = tmp_path / "both.pth", tiny_swin()
    model = {name: value.clone() for name, value in made.state_dict().items()}
    torch.save({"model": model, "model_ema": {name: value + 1 for name, value in model.items()}}, path)
    usual = FINETUNE_RECIPES["demo_finetune"]()
    plain, _, config = read_pretrained(path, usual, usual, None)
    before = RunRecord(status="running", config=to_json(config), pretrained=plain)
    before = RunRecord.from_json(before.to_json())
    averaged, weights, _ = read_pretrained(path, usual, usual, before, "model_ema")
    assert torch.equal(weights.state["encoder.norm.weight"], made.norm.weight + 1)
    assert averaged.digest != plain.digest
    assert read_pretrained(path, usual, usual, before)[:2] == (plain, None)


def test_weights_at_224_px_are_for_the_windows_of_384_px(tmp_path, capsys):
    """A narrow stand-in of Swin-B, so that its file is small: the default windows turn into the official ones."""
    small = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    save_encoder(tmp_path / "small.safetensors", build_encoder(small), Preprocessing(image_size=(224, 224)))
    pretrained, weights, config = _read("mixmae_swin_base_384px_finetune_100ep", tmp_path / "small.safetensors")
    encoder = config.sized_encoder()
    assert (encoder.image_size, encoder.window_sizes, encoder.drop_path) == (384, (16, 16, 24, 12), 0.15)
    model = _initial_model(pretrained, weights, config, tmp_path / "run")
    assert "5 resized" in capsys.readouterr().out  # four tables of relative positions, one of absolute ones
    assert model.encoder.pos_embed.shape == (1, 96 * 96, 8)


def test_a_continued_run_takes_its_architecture_from_its_record(tmp_path):
    """Whatever has become of the file since; flags that name no architecture still count."""
    path = tmp_path / "swin.safetensors"
    save_encoder(path, tiny_swin(), Preprocessing(image_size=(96, 96), mean=(0.1, 0.2, 0.3)))
    pretrained, _, config = _read("demo_finetune", path)
    before = RunRecord(status="running", config=to_json(config), pretrained=pretrained)
    path.unlink()
    usual = FINETUNE_RECIPES["demo_finetune"]()
    now, weights, again = read_pretrained(path, usual, usual, before)
    assert (now, weights, again) == (pretrained, None, config)
    grey = replace(usual, encoder=replace(usual.encoder, in_channels=1), pixel_mean=(0.2,), pixel_std=(0.2,))
    assert read_pretrained(path, grey, usual, before)[2].encoder == replace(config.encoder, in_channels=1)
