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
from mixmae.jobs.classification import INITIAL_FILE
from mixmae.jobs.config import FinetuneConfig, to_json
from mixmae.jobs.pretrained import keep_initial, read_pretrained
from mixmae.jobs.record import Pretrained, RunRecord
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
    save_encoder(path, tiny_swin(), Preprocessing(image_size=(96, 96)), overwrite=True)
    with pytest.raises(ValueError, match=r"for 3 channels and the encoder has 1: give --encoder.in-channels 3"):
        _read("demo_finetune", path, encoder=own)


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
