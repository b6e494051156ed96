"""Names there and back, safe reading, and reports that tell the truth. Numbers are in tests/reference."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mixmae.convert import config_from_official, from_official, load_weights, read_state_dict, to_official
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from tests.factories import tiny_mixmae, tiny_swin


@pytest.mark.parametrize("model", [tiny_mixmae(), ImageClassifier(tiny_swin(), 10)], ids=["pretraining", "finetuning"])
def test_round_trip(model):
    ours = model.state_dict()
    official = to_official(ours)
    back = from_official(official)
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    again = to_official(back)
    assert all(torch.equal(again[name], official[name]) for name in official)


def test_a_stage_ends_with_its_downsampling_in_official_names():
    ours = tiny_mixmae().state_dict()
    official = to_official(ours)
    assert torch.equal(official["layers.2.downsample.norm.weight"], ours["encoder.stages.3.downsample.norm.weight"])
    assert "layers.3.downsample.norm.weight" not in official


def test_configs_are_read_off_the_shapes():
    config = SwinConfig(
        image_size=(64, 96),
        in_channels=5,
        embed_dim=24,
        depths=(1, 2, 3, 1),
        num_heads=(2, 3, 4, 6),
        window_sizes=(8, 5, 4, 2),
        mlp_ratio=2.0,
    )
    state = to_official(ImageClassifier(SwinEncoder(config), 11).state_dict())
    found = config_from_official(state, image_size=(64, 96))
    assert found.encoder == config
    assert found.decoder is None
    assert found.num_classes == 11
    with pytest.raises(ValueError, match="pass image_size"):
        config_from_official(state)


def test_decoder_heads_are_asked_for_where_shapes_do_not_tell():
    method = tiny_mixmae()
    state = to_official(method.state_dict())
    with pytest.raises(ValueError, match="pass decoder_num_heads"):
        config_from_official(state)
    found = config_from_official(state, decoder_num_heads=4)
    assert found.decoder == method.config.decoder
    assert found.encoder == method.encoder.config
    assert found.num_classes is None


def test_report_names_what_did_not_fit():
    torch.manual_seed(1)
    model, other = ImageClassifier(tiny_swin((64, 64)), 10), tiny_mixmae((96, 96))
    with torch.no_grad():
        other.encoder.norm.bias.fill_(0.5)
    report = load_weights(model, other.state_dict())
    assert report.missing == ("head.weight", "head.bias")
    assert all(name.startswith("decoder.") for name in report.unexpected)
    assert report.mismatched == ("encoder.pos_embed",)  # made for 96 px; the model keeps its own for 64 px
    assert report.matched_share == pytest.approx(len(report.matched) / (len(report.matched) + 3))
    assert (model.encoder.norm.bias == 0.5).all()
    assert "2 missing (head.weight, head.bias)" in str(report)


def test_reads_official_checkpoints_with_their_namespace(tmp_path):
    weights = to_official(tiny_mixmae().state_dict())
    args = argparse.Namespace(lr=1e-4, output_dir="runs", betas=(0.9, 0.95))
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": args}, tmp_path / "checkpoint.pth")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("checkpoint.pth", "model.safetensors"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == weights.keys()
        assert torch.equal(read["mask_token"], weights["mask_token"])


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
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors"])
def test_damaged_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=name):
        read_state_dict(tmp_path / name)


def test_files_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        read_state_dict(tmp_path / "empty.pth")


def test_other_architectures_are_named():
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        from_official(tiny_mixmae().state_dict())
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        config_from_official({"conv1.weight": torch.zeros(1)})
