"""What is exported comes back bit for bit, runs elsewhere with the same numbers, and tells where it is from."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mixmae.timm_models  # noqa: F401
from mixmae.convert import (
    Preprocessing,
    first_conv,
    load_encoder,
    read_state_dict,
    read_weights,
    save_encoder,
    to_official,
)
from mixmae.convert.exported import compare
from mixmae.encoders.build import config_to_json
from mixmae.encoders.pvt import PvtEncoder, pvt_v2_b0
from mixmae.finetune.classification import ImageClassifier
from mixmae.tracking import create_run, metric_history
from mixmae.training.checkpoint import save_checkpoint
from pipelines.export import Arguments, main, read
from tests.contract.test_encoders import ENCODERS
from tests.factories import ablation_mixmae, noise_images, tiny_mae, tiny_mixmae, tiny_simmim, tiny_swin, tiny_vit

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name, prefix):
    content = load_file(GOLDEN / name)
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}


def export(source, output, *arguments):
    assert main([str(source), "--output", str(output), *map(str, arguments)]) == 0


def error(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    assert stop.value.code != 0
    return capsys.readouterr().err


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def trained(model):
    """Weights that no initialisation gives, so that nothing fresh passes for them."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, mlflow_db):
    """A checkpoint of a run with a panel and a curve in MLflow; the method it is of; the run's reference."""
    base = tmp_path_factory.mktemp("run")
    folder = base / "runs" / "photos"
    method = trained(tiny_mixmae())
    shutil.copy(mlflow_db, base / "mlflow.db")
    reference = create_run(uri=f"sqlite:///{base / 'mlflow.db'}", experiment="test", name="photos", params={}, tags={})
    state = {
        "config": {"encoder": config_to_json(method.encoder.config), "augment": {"image_size": 96}},
        "position": {"step": 40},
        "mlflow": vars(reference),
        "data": {"name": "photos", "digest": "d"},
        "versions": {"torch": "2"},
    }
    checkpoint = folder / "checkpoints" / "step_0000040"
    save_checkpoint(checkpoint, model=method, optimizer=None, state=state)
    (folder / "run.json").write_text(json.dumps({"mlflow": vars(reference)}))
    (folder / "panels").mkdir()
    shutil.copy(Path(__file__).parents[3] / "docs/images/demo_panel.png", folder / "panels" / "step_0000040.png")
    return checkpoint, method, reference


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


def test_our_own_files_come_back_bit_for_bit(tmp_path, run):
    """Run checkpoint -> encoder file -> hub folder -> encoder file, and the decoder through the official names."""
    checkpoint, method, _ = run
    export(checkpoint, tmp_path / "one", "--formats", "encoder", "official")
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
    assert metadata.source["position"] == {"step": 40}


def test_official_names_of_other_objectives(tmp_path):
    """The official classes have no place for SimMIM's decoder, nor for the mask tokens of an ablation's encoder."""
    method = trained(tiny_simmim())
    encoder = {f"encoder.{name}": value for name, value in method.encoder.state_dict().items()}
    export(run_of(method, tmp_path), tmp_path / "out", "--formats", "official", "mmpretrain")
    assert same(read_weights(tmp_path / "out" / "official.pth").state, encoder)
    assert same(read_weights(tmp_path / "out" / "mmpretrain.pth").state, encoder)
    method = trained(ablation_mixmae("learnable"))
    export(run_of(method, tmp_path / "ablation"), tmp_path / "again", "--formats", "official")
    expected = {name: value for name, value in method.state_dict().items() if name != "mask_token"}
    assert same(read_weights(tmp_path / "again" / "official.pth").state, expected)


def test_hub_folders_open_in_timm_and_tell_of_the_run(tmp_path, run):
    checkpoint, method, reference = run
    from mlflow import MlflowClient

    for step, loss in ((10, 1.0), (20, 0.9), (20, 0.8), (40, 0.7)):
        MlflowClient(tracking_uri=reference.uri).log_metric(reference.run_id, "train/loss", loss, step=step)
    assert [step for step, _ in metric_history(reference, "train/loss")] == [10, 20, 40]
    export(checkpoint, tmp_path / "out", "--formats", "hub", "--data-licence", "CC-BY | 4.0")
    hub = tmp_path / "out" / "hub"
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    images = noise_images(2)
    with torch.no_grad():
        assert torch.equal(model(images), method.encoder(images).mean(dim=1))
        assert timm.create_model(f"local-dir:{hub}", pretrained=True, num_classes=5)(images).shape == (2, 5)
        larger = timm.create_model(f"local-dir:{hub}", pretrained=True, img_size=160, in_chans=1).eval()
        assert larger(noise_images(1, (160, 160), 1)).shape == (1, 128)
    card = (hub / "README.md").read_text()
    for fact in (reference.run_id, "| step | 40 |", "| training data | photos |", "CC-BY", "panel.png", "loss.png"):
        assert fact in card
    assert str(checkpoint.parents[2]) not in card + (hub / "config.json").read_text()
    assert (hub / "loss.png").stat().st_size > 1000
    Path(reference.uri.removeprefix("sqlite:///")).unlink()  # without the store: no curve, all else
    export(checkpoint, tmp_path / "out", "--formats", "hub", "--overwrite")
    assert "loss.png" not in (hub / "README.md").read_text()
    assert not (hub / "loss.png").exists()


def run_of(model, base):
    """A checkpoint of a run without MLflow."""
    checkpoint = base / "runs" / "photos" / "checkpoints" / "step_0000001"
    config = {"encoder": config_to_json(model.encoder.config), "augment": {"image_size": 96}}
    save_checkpoint(checkpoint, model=model, optimizer=None, state={"config": config, "position": {"step": 1}})
    (checkpoint.parents[1] / "run.json").write_text("{}")
    return checkpoint


def test_the_folder_of_a_run_is_exported(tmp_path, monkeypatch):
    """Its last checkpoint, or its best weights where it keeps them, under the name of the run."""
    first, last, best = (trained(tiny_swin()) for _ in range(3))
    for factor, model in enumerate((first, last, best), start=1):
        model.norm.bias.data.fill_(factor)
    monkeypatch.chdir(tmp_path)
    folder = run_of(tiny_simmim(first), tmp_path).parents[1]
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


def test_a_run_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert "a run without a checkpoint yet" in error(capsys, tmp_path)


@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS)
def test_runs_of_every_encoder_are_exported(tmp_path, build):
    method = trained(tiny_mae() if build is tiny_vit else tiny_simmim(build()))
    export(run_of(method, tmp_path), tmp_path / "out", "--formats", "encoder", "hub")
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


@pytest.mark.slow
@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS)
def test_graphs_of_every_encoder_give_the_same_numbers(tmp_path, capsys, build):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(run_of(trained(tiny_simmim(build())), tmp_path), tmp_path / "out", "--formats", "onnx", "pt2")
    printed = capsys.readouterr().out
    assert "torch.export differs by" in printed
    assert "onnxruntime differs by" in printed


def test_torch_export_gives_the_same_numbers(tmp_path, capsys):
    encoder = trained(tiny_vit())  # the smallest graph
    save_encoder(tmp_path / "weights.safetensors", encoder, Preprocessing(image_size=(96, 96)))
    export(tmp_path / "weights.safetensors", tmp_path / "out", "--formats", "pt2")
    assert "torch.export differs by" in capsys.readouterr().out
    images = noise_images(5, seed=9)
    extra = {"mixmae.json": ""}
    program = torch.export.load(tmp_path / "out" / "encoder.pt2", extra_files=extra).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert json.loads(extra["mixmae.json"])["preprocessing"]["image_size"] == [96, 96]


def test_onnx_gives_the_same_numbers(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(ImageClassifier(tiny_vit(), 7))
    save_encoder(tmp_path / "weights.safetensors", model, Preprocessing(image_size=(96, 96)))
    export(tmp_path / "weights.safetensors", tmp_path / "out", "--formats", "onnx")
    assert "onnxruntime differs by" in capsys.readouterr().out
    images = noise_images(5, seed=9)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "classifier.onnx")
    with torch.no_grad():
        expected = model(images)
    output = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["mixmae"])
    assert metadata["encoder"] == config_to_json(tiny_vit().config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classifier.onnx"]


def test_a_graph_with_other_numbers_is_refused(tmp_path):
    save_file(tiny_swin().state_dict(), tmp_path / "weights.safetensors")
    item = read(Arguments(source=tmp_path / "weights.safetensors"))
    assert "differs by 0e+00" in compare(item, "itself", item.model)
    with pytest.raises(ValueError, match="gives other numbers than the model"):
        compare(item, "another", lambda images: item.model(images) + 0.01)
    with pytest.raises(ValueError, match="gives other numbers"):
        compare(item, "broken", lambda images: item.model(images) * float("nan"))


def test_mistakes(tmp_path, capsys):
    assert "does not exist" in error(capsys, tmp_path / "none.pth")
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "linear.safetensors")
    assert "no known format" in error(capsys, tmp_path / "linear.safetensors")
    vit = timm.create_model("test_vit").state_dict()
    torch.save(vit, tmp_path / "vit.pth")
    assert "a ViT of width 64 with 6 blocks, which cannot be built" in error(capsys, tmp_path / "vit.pth")
    torch.save({"model": to_official(tiny_mixmae().state_dict())}, tmp_path / "official.pth")
    assert "--mean needs a value for each of the 3 channels" in error(capsys, tmp_path / "official.pth", "--mean", 0.5)
    out = tmp_path / "out"
    export(tmp_path / "official.pth", out, "--mean", 0.1, 0.2, 0.3)
    assert load_encoder(out / "encoder.safetensors")[1].preprocessing.mean == (0.1, 0.2, 0.3)
    before = (out / "encoder.safetensors").read_bytes()
    arguments = (tmp_path / "official.pth", "--output", out, "--formats", "official", "encoder")
    assert "there already" in error(capsys, *arguments)
    assert [path.name for path in out.iterdir()] == ["encoder.safetensors"]  # nothing of the rest was written
    assert (out / "encoder.safetensors").read_bytes() == before
    assert main([*map(str, arguments), "--overwrite"]) == 0
    assert "--formats" in error(capsys, tmp_path / "official.pth", "--formats", "keras")


def test_the_card_of_a_known_size(tmp_path, capsys):
    torch.save(PvtEncoder(pvt_v2_b0()).state_dict(), tmp_path / "b0.pth")
    export(tmp_path / "b0.pth", tmp_path / "out", "--formats", "hub")
    card = (tmp_path / "out" / "hub" / "README.md").read_text()
    assert card.splitlines()[7] == "# pvt_v2_b0, an encoder of MixMAE"
    assert "| licence of the data | not stated |" in card
    assert "![" not in card
    refusal = error(capsys, tmp_path / "b0.pth", "--output", tmp_path / "out", "--formats", "official")
    assert "are the paper's Swin, and this is a PVT v2 of width 32 with 2-2-2-2 blocks (pvt_v2_b0)" in refusal
