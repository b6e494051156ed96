"""What is exported comes back bit for bit, whatever it is exported from, and what users get wrong."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mixmae.timm_models  # noqa: F401
from mixmae.convert import first_conv, load_encoder, read_state_dict, read_weights, to_official
from mixmae.encoders.build import config_to_json
from mixmae.encoders.pvt import PvtEncoder, pvt_v2_b0
from mixmae.training.checkpoint import save_checkpoint
from pipelines.export import main
from tests.contract.test_encoders import ENCODERS
from tests.factories import (
    ablation_mixmae,
    checkpoint_of,
    noise_images,
    same,
    tiny_mae,
    tiny_mixmae,
    tiny_simmim,
    tiny_swin,
    tiny_vit,
    trained,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name, prefix):
    content = load_file(GOLDEN / name)
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}


def export(source, output, *arguments):
    assert main([str(source), "--output", str(output), *map(str, arguments)]) == 0


OFFICIAL = {
    "official pretraining": ("mixmim_tiny_pretrain.safetensors", "model.", "official", "model"),
    "official finetuning": ("mixmim_tiny_finetune.safetensors", "model.", "official", "model"),
    "mmpretrain": ("mmpretrain_tiny_pretrain.safetensors", "state_dict.", "mmpretrain", "state_dict"),
}


@pytest.mark.parametrize(("name", "prefix", "written", "key"), OFFICIAL.values(), ids=OFFICIAL)
def test_foreign_files_come_back_bit_for_bit(tmp_path, name, prefix, written, key):
    theirs = golden(name, prefix)
    torch.save({key: theirs}, tmp_path / "theirs.pth")
    export(tmp_path / "theirs.pth", tmp_path / "out", "--formats", written, "encoder")
    content = torch.load(tmp_path / "out" / f"{written}.pth", weights_only=True)
    assert same(content[key], theirs)
    first = read_weights(tmp_path / "theirs.pth")
    assert same(read_weights(tmp_path / "out" / f"{written}.pth").state, first.state)
    kind = "classifier" if "head.weight" in first.state else "encoder"
    kept = {name: value for name, value in first.state.items() if not name.startswith("decoder.")}
    assert same(read_weights(tmp_path / "out" / f"{kind}.safetensors").state, kept)


def test_our_own_files_come_back_bit_for_bit(tmp_path):
    """Run checkpoint -> encoder file -> hub folder -> encoder file, and the decoder through the official names."""
    method = trained(tiny_mixmae())
    export(checkpoint_of(method, tmp_path), tmp_path / "one", "--formats", "encoder", "official")
    official = tmp_path / "one" / "official.pth"
    assert same(read_weights(official).state, method.state_dict())
    save_file(read_weights(official).state, tmp_path / "again.safetensors")
    assert same(read_state_dict(tmp_path / "again.safetensors"), method.state_dict())

    file = tmp_path / "one" / "encoder.safetensors"
    export(file, tmp_path / "two", "--formats", "hub")
    export(tmp_path / "two" / "hub", tmp_path / "three")
    first, last = (read_weights(path) for path in (file, tmp_path / "three" / "encoder.safetensors"))
    assert same(last.state, first.state)
    assert last.metadata == first.metadata
    encoder, metadata = load_encoder(tmp_path / "two" / "hub")
    assert same(encoder.state_dict(), method.encoder.state_dict())
    assert metadata.source["position"] == {"step": 1}


def test_official_names_of_other_objectives(tmp_path):
    """The official classes have no place for SimMIM's decoder, nor for the mask tokens of an ablation's encoder."""
    method = trained(tiny_simmim())
    encoder = {f"encoder.{name}": value for name, value in method.encoder.state_dict().items()}
    export(checkpoint_of(method, tmp_path), tmp_path / "out", "--formats", "official", "mmpretrain")
    assert same(read_weights(tmp_path / "out" / "official.pth").state, encoder)
    assert same(read_weights(tmp_path / "out" / "mmpretrain.pth").state, encoder)
    method = trained(ablation_mixmae("learnable"))
    export(checkpoint_of(method, tmp_path / "ablation"), tmp_path / "again", "--formats", "official")
    expected = {name: value for name, value in method.state_dict().items() if name != "mask_token"}
    assert same(read_weights(tmp_path / "again" / "official.pth").state, expected)


def test_the_folder_of_a_run_is_exported(tmp_path, monkeypatch):
    """Its last checkpoint, or its best weights where it keeps them, under the name of the run."""
    first, last, best = (trained(tiny_swin()) for _ in range(3))
    for factor, model in enumerate((first, last, best), start=1):
        model.norm.bias.data.fill_(factor)
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_of(tiny_simmim(first), tmp_path).parents[1]
    state = {"config": {"encoder": config_to_json(first.config), "augment": {"image_size": 96}}}
    save_checkpoint(folder / "checkpoints" / "step_0000002", model=tiny_simmim(last), optimizer=None, state=state)
    assert main([str(folder)]) == 0
    assert same(load_encoder("exports/photos/encoder.safetensors")[0].state_dict(), last.state_dict())
    save_checkpoint(folder / "best", model=tiny_simmim(best), optimizer=None, state=state)
    assert main([str(folder), "--overwrite"]) == 0
    assert same(load_encoder("exports/photos/encoder.safetensors")[0].state_dict(), best.state_dict())


def test_the_folder_of_a_sweep_is_exported(tmp_path, monkeypatch):
    """The weights that its link `best` leads to, with the panel of their run, under the name of the sweep."""
    sweep, method = tmp_path / "rates", trained(tiny_simmim())
    trial = sweep / "trials" / "one"
    state = {"config": {"encoder": config_to_json(method.encoder.config), "augment": {"image_size": 96}}}
    save_checkpoint(trial / "checkpoints" / "step_0000001", model=method, optimizer=None, state=state)
    for folder in (sweep, trial):
        (folder / "run.json").write_text("{}")
    (sweep / "best").symlink_to("trials/one/checkpoints/step_0000001", target_is_directory=True)
    (trial / "panels").mkdir()
    (trial / "panels" / "step_0000001.png").write_bytes(b"panel")
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep), "--formats", "encoder", "hub"]) == 0
    out = tmp_path / "exports" / "rates"
    assert same(load_encoder(out / "encoder.safetensors")[0].state_dict(), method.encoder.state_dict())
    assert (out / "hub" / "panel.png").read_bytes() == b"panel"


def test_one_of_several_sets_of_weights_is_exported(tmp_path, error, capsys):
    made = tiny_swin()
    average = {name: value + 1 for name, value in made.state_dict().items()}
    torch.save({"model": made.state_dict(), "model_ema": average}, tmp_path / "both.pth")
    export(tmp_path / "both.pth", tmp_path / "usual")
    assert "reading the trained weights, under model; the file has 2 sets of weights" in capsys.readouterr().out
    assert same(load_encoder(tmp_path / "usual" / "encoder.safetensors")[0].state_dict(), made.state_dict())
    export(tmp_path / "both.pth", tmp_path / "average", "--weights-key", "model_ema")
    encoder, metadata = load_encoder(tmp_path / "average" / "encoder.safetensors")
    assert torch.equal(encoder.norm.weight, average["norm.weight"])
    assert metadata.source["key"] == "model_ema"
    sentence = error(main, tmp_path / "both.pth", "--weights-key", "teacher")
    assert "has no weights under teacher, but under model, model_ema" in sentence


def test_a_file_with_one_channel_or_thirteen_is_exported(tmp_path):
    for channels in (1, 13):
        torch.save(tiny_swin(in_channels=channels).state_dict(), tmp_path / "bands.pth")
        export(tmp_path / "bands.pth", tmp_path / f"{channels}", "--mean", *[0.25] * channels)
        preprocessing = load_encoder(tmp_path / f"{channels}" / "encoder.safetensors")[1].preprocessing
        assert preprocessing.mean == (0.25,) * channels
        assert len(preprocessing.std) == channels


def test_a_run_without_a_checkpoint(tmp_path, error):
    (tmp_path / "run.json").write_text("{}")
    assert "a run without a checkpoint yet" in error(main, tmp_path)


@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS)
def test_runs_of_every_encoder_are_exported(tmp_path, build):
    method = trained(tiny_mae() if build is tiny_vit else tiny_simmim(build()))
    export(checkpoint_of(method, tmp_path), tmp_path / "out", "--formats", "encoder", "hub")
    encoder, metadata = load_encoder(tmp_path / "out" / "encoder.safetensors")
    assert metadata.encoder == method.encoder.config
    assert same(encoder.state_dict(), method.encoder.state_dict())
    hub = f"local-dir:{tmp_path / 'out' / 'hub'}"
    images = noise_images(2)
    with torch.no_grad():
        model = timm.create_model(hub, pretrained=True).eval()
        assert torch.equal(model(images), method.encoder(images).mean(dim=1))
        grey = timm.create_model(hub, pretrained=True, in_chans=1)
    name = f"{first_conv(method.encoder)}.weight"
    torch.testing.assert_close(grey.state_dict()[name], method.state_dict()[name].sum(dim=1, keepdim=True))


def test_mistakes(tmp_path, error):
    assert "does not exist" in error(main, tmp_path / "none.pth")
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "linear.safetensors")
    assert "no known format" in error(main, tmp_path / "linear.safetensors")
    vit = timm.create_model("test_vit").state_dict()
    torch.save(vit, tmp_path / "vit.pth")
    assert "a ViT of width 64 with 6 blocks, which cannot be built" in error(main, tmp_path / "vit.pth")
    torch.save({"model": to_official(tiny_mixmae().state_dict())}, tmp_path / "official.pth")
    assert "--mean needs a value for each of the 3 channels" in error(main, tmp_path / "official.pth", "--mean", 0.5)
    out = tmp_path / "out"
    export(tmp_path / "official.pth", out, "--mean", 0.1, 0.2, 0.3)
    assert load_encoder(out / "encoder.safetensors")[1].preprocessing.mean == (0.1, 0.2, 0.3)
    before = (out / "encoder.safetensors").read_bytes()
    arguments = (tmp_path / "official.pth", "--output", out, "--formats", "official", "encoder")
    assert "there already" in error(main, *arguments)
    assert [path.name for path in out.iterdir()] == ["encoder.safetensors"]  # nothing of the rest was written
    assert (out / "encoder.safetensors").read_bytes() == before
    assert main([*map(str, arguments), "--overwrite"]) == 0
    assert "--formats" in error(main, tmp_path / "official.pth", "--formats", "keras", code=2)
    torch.save(PvtEncoder(pvt_v2_b0()).state_dict(), tmp_path / "b0.pth")
    refusal = error(main, tmp_path / "b0.pth", "--output", tmp_path / "b0", "--formats", "official")
    assert "are the paper's Swin, and this is a PVT v2 of width 32 with 2-2-2-2 blocks (pvt_v2_b0)" in refusal
