"""Hub folders open in timm, and their model cards tell of the run."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import mixmae.timm_models  # noqa: F401
from mixmae.convert import load_encoder
from mixmae.convert.exported import read_export
from mixmae.convert.hub import write_hub
from mixmae.encoders.build import config_to_json
from mixmae.encoders.pvt import PvtEncoder, pvt_v2_b0
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.tracking import create_run, metric_history
from mixmae.training.checkpoint import save_checkpoint
from tests.factories import DECODER, checkpoint_of, noise_images, small_swin, tiny_mixmae, trained

PANEL = Path(__file__).parents[3] / "docs" / "images" / "demo_panel.png"


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
    shutil.copy(PANEL, folder / "panels" / "step_0000040.png")
    return checkpoint, method, reference


def test_hub_folders_open_in_timm_and_tell_of_the_run(tmp_path, run):
    checkpoint, method, reference = run
    from mlflow import MlflowClient

    for step, loss in ((10, 1.0), (20, 0.9), (20, 0.8), (40, 0.7)):
        MlflowClient(tracking_uri=reference.uri).log_metric(reference.run_id, "train/loss", loss, step=step)
    assert [step for step, _ in metric_history(reference, "train/loss")] == [10, 20, 40]
    hub = tmp_path / "hub"
    write_hub(read_export(checkpoint, data_licence="CC-BY | 4.0"), hub)
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
    again = tmp_path / "again"
    write_hub(read_export(checkpoint), again)
    assert "loss.png" not in (again / "README.md").read_text()
    assert not (again / "loss.png").exists()
    assert (again / "panel.png").exists()


def test_the_card_of_a_known_size(tmp_path):
    torch.save(PvtEncoder(pvt_v2_b0()).state_dict(), tmp_path / "b0.pth")
    write_hub(read_export(tmp_path / "b0.pth"), tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.splitlines()[7] == "# pvt_v2_b0, an encoder of MixMAE"
    assert "| licence of the data | not stated |" in card
    assert "![" not in card


def test_an_encoder_for_small_images_comes_back(tmp_path):
    """From a run through a hub folder to timm and to ours, with its patches, stages and size."""
    method = trained(MixMAE(small_swin(), MixMAEConfig(decoder=DECODER)))
    write_hub(read_export(checkpoint_of(method, tmp_path)), tmp_path / "hub")
    images = noise_images(2, (32, 32))
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert in_timm.feature_info[-1]["reduction"] == 4
    encoder, metadata = load_encoder(tmp_path / "hub")
    assert metadata.encoder == small_swin().config
    with torch.no_grad():
        assert torch.equal(in_timm(images), method.encoder(images).mean(dim=1))
        assert torch.equal(encoder(images), method.encoder(images))
