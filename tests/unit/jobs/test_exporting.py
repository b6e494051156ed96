"""Models of segmentation and detection leave as programs that give the model's numbers and know their classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmae.convert import load_encoder
from mixmae.convert.exported import noise
from mixmae.jobs.detecting import load_finder
from mixmae.jobs.exporting import DensePart
from mixmae.jobs.in_process import build_seeded
from mixmae.jobs.segmenter import load_segmenter
from mixmae.panels import palette
from mixmae.training.checkpoint import MODEL_FILE, save_checkpoint
from mixmae.training.loop import TrainState
from pipelines.export import main
from tests.factories import same
from tests.unit.jobs import test_detection as detection
from tests.unit.jobs import test_segmentation as segmentation


def run_of(tests, folder: Path, **changes: object) -> Path:
    """The folder of a run whose model knows no class better than another, and whose batch norms have seen images."""
    job = tests.job_on(tests.scenes(folder / "set", 4), folder / "run", **changes)
    model = build_seeded(job)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    state = job.describe() | {"position": vars(TrainState(step=1))}
    save_checkpoint(folder / "run" / "best", model=model.eval(), optimizer=None, state=state)
    (folder / "run" / "run.json").write_text("{}")
    return folder / "run"


@pytest.mark.slow
def test_a_segmentation_model_is_exported_whole(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, out = run_of(segmentation, tmp_path, **{"augment.image_size": (64, 96)}), tmp_path / "out"
    assert main([str(run), "--output", str(out), "--formats", "encoder", "onnx", "pt2"]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime differs by" in printed
    assert "torch.export differs by" in printed
    assert {path.name for path in out.iterdir()} == {"encoder.safetensors", "segmenter.onnx", "segmenter.pt2"}
    segmenter = load_segmenter(run, device="cpu")
    assert same(load_encoder(out / "encoder.safetensors")[0].state_dict(), segmenter.model.encoder.state_dict())

    session = onnxruntime.InferenceSession(out / "segmenter.onnx")
    assert [part.shape[1:] for part in session.get_inputs()] == [[3, 64, 96]]
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixmae"])
    assert about["task"] == "segmentation"
    assert about["classes"] == list(segmenter.class_names)
    assert about["palette"] == palette(segmenter.class_names)[:7].tolist()
    assert about["preprocessing"]["image_size"] == [64, 96]
    assert about["preprocessing"]["mean"] == list(segmenter.mean)
    assert about["windows"] == {"size": [64, 96], "stride": 48}

    # An image of the input's size, prepared as the metadata say: the classes are those that predict.py writes.
    pixels = np.asarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3)), dtype=np.uint8)
    mean, std = (np.array(about["preprocessing"][name], dtype=np.float32) for name in ("mean", "std"))
    images = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]
    scores, classes = session.run(None, {"images": images.astype(np.float32)})
    assert scores.shape == (1, 7, 16, 24)
    assert len(np.unique(classes)) > 1
    assert (classes[0] == segmenter.predict([pixels])[0]).mean() > 0.999


@pytest.mark.slow
def test_of_a_detector_the_dense_part_is_exported(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, out = run_of(detection, tmp_path), tmp_path / "out"
    # The file of the weights means the checkpoint that it is in.
    assert main([str(run / "best" / MODEL_FILE), "--output", str(out), "--formats", "onnx"]) == 0
    assert "without the heads that look at regions" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "detector_dense.onnx")
    finder = load_finder(run, device="cpu")
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixmae"])
    assert about["classes"] == list(finder.class_names)
    assert about["category_ids"] == list(finder.category_ids)
    assert about["strides"] == list(finder.model.strides)
    assert not any("roi_heads" in name for name in (out / "detector_dense.onnx").read_bytes().decode("latin1").split())
    images = noise(2, 3, finder.augment.size)
    names = [part.name for part in session.get_outputs()]
    assert names == ["level0", "level1", "level2", "level3", "objectness", "boxes"]
    found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))

    # The proposals of the model itself are among the boxes that the program gives.
    model, sizes = finder.model, [finder.augment.size] * 2
    with torch.no_grad():
        levels, logits, offsets = model.dense(images)
        proposals = model.propose(logits, offsets, model.anchors(levels), sizes)
    boxes = torch.from_numpy(found["boxes"]).clamp(min=0, max=64)
    for box, own in zip(boxes, proposals, strict=True):
        assert len(own) > 10
        assert torch.cdist(own, box, p=torch.inf).min(dim=1).values.max() < 1e-2


def test_anchors_become_boxes(tmp_path):
    """Where nothing is corrected, a box is its anchor."""
    model = load_finder(run_of(detection, tmp_path), device="cpu").model
    with torch.no_grad():
        for parameter in model.rpn.head.bbox_pred.parameters():
            parameter.zero_()
        *levels, objectness, boxes = DensePart(model).eval()(noise(2, 3, (64, 64)))
    anchors = torch.cat(model.anchors(levels))
    assert objectness.shape == (2, len(anchors))
    torch.testing.assert_close(boxes, anchors.expand(2, -1, -1))
