"""Exported programs give the model's numbers, with onnxruntime and with torch alone."""

import json

import pytest
import torch

from mixmae.convert import Preprocessing, save_encoder
from mixmae.convert.exported import read_export
from mixmae.convert.programs import check_onnx, write_onnx, write_pt2
from mixmae.encoders.build import config_to_json
from mixmae.finetune.classification import ImageClassifier
from tests.contract.test_encoders import ENCODERS
from tests.factories import checkpoint_of, noise_images, small_swin, tiny_simmim, tiny_vit, trained


@pytest.mark.slow
@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS)
def test_graphs_of_every_encoder_give_the_same_numbers(tmp_path, build):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    item = read_export(checkpoint_of(trained(tiny_simmim(build())), tmp_path))
    check_onnx(item)
    assert "torch.export differs by" in write_pt2(item, tmp_path / "encoder.pt2")
    assert "onnxruntime differs by" in write_onnx(item, tmp_path / "encoder.onnx")


@pytest.mark.parametrize("build", [tiny_vit, small_swin])  # the smallest graphs
def test_torch_export_gives_the_same_numbers(tmp_path, build):
    encoder = trained(build())
    save_encoder(tmp_path / "weights.safetensors", encoder, Preprocessing(image_size=encoder.image_size))
    item = read_export(tmp_path / "weights.safetensors")
    assert "torch.export differs by" in write_pt2(item, tmp_path / "encoder.pt2")
    images = noise_images(5, encoder.image_size, seed=9)
    extra = {"mixmae.json": ""}
    program = torch.export.load(tmp_path / "encoder.pt2", extra_files=extra).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert json.loads(extra["mixmae.json"])["preprocessing"]["image_size"] == list(encoder.image_size)


def test_onnx_gives_the_same_numbers(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(ImageClassifier(tiny_vit(), 7))
    save_encoder(tmp_path / "weights.safetensors", model, Preprocessing(image_size=(96, 96)))
    (tmp_path / "out").mkdir()
    item = read_export(tmp_path / "weights.safetensors")
    assert "onnxruntime differs by" in write_onnx(item, tmp_path / "out" / "classifier.onnx")
    images = noise_images(5, seed=9)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "classifier.onnx")
    with torch.no_grad():
        expected = model(images)
    output = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["mixmae"])
    assert metadata["encoder"] == config_to_json(tiny_vit().config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classifier.onnx"]
