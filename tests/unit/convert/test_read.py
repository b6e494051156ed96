"""Files and folders are read without running code, and say what they hold."""

import argparse
import json
import pickle
import sys
import types
from itertools import product

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from mixmae.convert import (
    Preprocessing,
    load_encoder,
    load_pretrained,
    read_state_dict,
    read_weights,
    save_encoder,
    to_official,
)
from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import config_to_json
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.training.checkpoint import save_checkpoint
from tests.contract.test_encoders import ENCODERS
from tests.factories import noise_images, tiny_mae, tiny_mixmae, tiny_simmim, tiny_swin, tiny_vit

PREPROCESSING = Preprocessing(image_size=(96, 96), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_reads_official_checkpoints_with_their_namespace(tmp_path):
    weights = to_official(tiny_mixmae().state_dict())
    args = argparse.Namespace(lr=1e-4, output_dir="runs", betas=(0.9, 0.95))
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": args}, tmp_path / "checkpoint.pth")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("checkpoint.pth", "model.safetensors"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == weights.keys()
        assert torch.equal(read["mask_token"], weights["mask_token"])


def test_reads_checkpoints_with_a_yacs_config_and_ddp_names(tmp_path, monkeypatch):
    """SimMIM's files hold one; it is read as a plain dict, whether or not yacs is installed."""

    class CfgNode(dict):
        def __init__(self, content):
            super().__init__(content)
            self.__dict__["__renamed_keys__"] = {}

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = CfgNode({"MODEL": CfgNode({"TYPE": "swin"}), "IMG": 192})
    weights = to_official(tiny_mixmae().state_dict())
    torch.save({"model": {f"module.{name}": v for name, v in weights.items()}, "config": config}, tmp_path / "of.pth")
    monkeypatch.undo()
    assert read_state_dict(tmp_path / "of.pth").keys() == weights.keys()


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_a_file_that_asks_for_code_is_refused(tmp_path, save):
    save({"model": tiny_swin().state_dict(), "args": Calls(tmp_path / "was_run")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "was_run").exists()


def test_changed_weights_are_noticed(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, tiny_swin(), PREPROCESSING)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = read_state_dict(path)
    state["encoder.norm.bias"] = state["encoder.norm.bias"] + 1
    save_file(state, path, metadata=metadata)
    with pytest.raises(ValueError, match="damaged or was changed"):
        read_weights(path)


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "first runs"])
def test_a_checkpoint_folder_of_a_run(tmp_path, typed):
    method = tiny_mixmae((96, 128))
    encoder = config_to_json(SwinConfig(**{**vars(method.encoder.config), "image_size": 224}))
    if not typed:
        del encoder["type"]
    config = {"encoder": encoder, "augment": {"image_size": [96, 128]}, "pixel_mean": [0.5] * 3, "pixel_std": [0.2] * 3}
    state = {
        "config": config,
        "position": {"step": 7},
        "mlflow": {"run_id": "abc", "uri": "sqlite:////home/me.db"},
        "data": {"name": "photos", "digest": "d", "source": "/home/me/photos"},
    }
    folder = tmp_path / "checkpoints" / "step_0000007"
    save_checkpoint(folder, model=method, optimizer=None, state=state)
    weights = read_weights(folder)
    assert weights.metadata.encoder == method.encoder.config
    assert weights.metadata.preprocessing == Preprocessing(image_size=(96, 128), mean=(0.5,) * 3, std=(0.2,) * 3)
    assert weights.metadata.source["run_id"] == "abc"
    assert weights.metadata.source["data"] == {"name": "photos", "digest": "d"}
    assert "/home/me" not in json.dumps(weights.metadata.to_json())  # a published file tells no paths
    assert all(torch.equal(value, weights.state[name]) for name, value in method.state_dict().items())
    encoder, _ = load_encoder(folder)
    assert torch.equal(encoder.pos_embed, method.encoder.pos_embed)
    with pytest.raises(ValueError, match=r"choose one of its checkpoints.*step_0000007"):
        read_weights(tmp_path)


def mixmae_on(encoder):
    return MixMAE(encoder, MixMAEConfig(decoder=DecoderConfig(dim=32, depth=1, num_heads=4)))


@pytest.mark.parametrize(
    ("build", "method"),
    [*product(ENCODERS.values(), (mixmae_on, tiny_simmim)), (tiny_vit, tiny_mae)],
    ids=lambda function: function.__name__,
)
def test_runs_of_every_encoder_and_method_are_read(tmp_path, build, method):
    made = method(build()).eval()
    config = {"encoder": config_to_json(made.encoder.config), "augment": {"image_size": made.encoder.image_size[0]}}
    save_checkpoint(tmp_path / "step_1", model=made, optimizer=None, state={"config": config})
    weights = read_weights(tmp_path / "step_1")
    assert weights.format == "mixmae"
    assert weights.state.keys() == made.state_dict().keys()
    encoder, metadata = load_encoder(tmp_path / "step_1")
    assert metadata.encoder == made.encoder.config
    with torch.no_grad():
        images = noise_images(1, encoder.image_size)
        assert torch.equal(encoder(images), made.encoder(images))
    again = method(build())
    for parameter in again.parameters():
        parameter.data.zero_()
    assert load_pretrained(again, tmp_path / "step_1").matched_share == 1.0
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"folder without model\.safetensors$"):
        read_weights(tmp_path)


def test_foreign_files_tell_what_their_shapes_tell(tmp_path):
    torch.save({"model": to_official(tiny_mixmae().state_dict())}, tmp_path / "official.pth")
    metadata = read_weights(tmp_path / "official.pth").metadata
    assert metadata.encoder == tiny_swin().config
    assert metadata.source == {"format": "official MixMIM", "name": "official.pth"}
    assert metadata.data_licence == "not stated"
    wide = SwinConfig(image_size=(64, 96), embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    torch.save(to_official(SwinEncoder(wide).state_dict()), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="384 tokens, which is not a square"):
        load_encoder(tmp_path / "wide.pth")
    assert load_encoder(tmp_path / "wide.pth", image_size=(64, 96))[1].encoder == wide
