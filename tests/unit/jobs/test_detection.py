"""A detection run as its workers see it: steps, evaluation, panels, weights; and that it learns."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmae.convert import load_encoder
from mixmae.data.rle import decode_rle
from mixmae.data.shards.scenes import CLASS_NAMES, DENSE, draw
from mixmae.data.shards.write import StoredImage, shard_schema, write_shard
from mixmae.data.source import DataError, RowRange, Source
from mixmae.data.sources import open_source
from mixmae.data.truth import Truth
from mixmae.detection.coco import ImageTruth
from mixmae.encoders.swin import swin_base, with_dense_windows
from mixmae.jobs import detection
from mixmae.jobs.config import DetectConfig
from mixmae.jobs.detecting import Finder, finder_of, is_detection, load_finder
from mixmae.jobs.detection import DetectionJob
from mixmae.jobs.in_process import batches_of, build_seeded, train_in_process
from mixmae.objects import Detections
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.failures import TrainingStopped
from mixmae.training.loop import TrainState
from pipelines.recipes import DETECT_RECIPES
from tests.factories import same

pytest.importorskip("pycocotools")


def scenes(folder: Path, count: int, first: int = 0, broken: int = -1, **changes: object) -> Source:
    """A set of the built-in scenes; nothing is known about the objects of one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw(0, first + index) for index in range(count)]
    truths = [with_changes(scene.truth, changes) for scene in drawn]
    images = [
        StoredImage(scene.jpeg, f"{index}.jpg", truth=Truth() if index == broken else truth)
        for index, (scene, truth) in enumerate(zip(drawn, truths, strict=True))
    ]
    write_shard(folder / "train-00000-of-00001.parquet", images, shard_schema(None, dense=DENSE))
    return open_source(str(folder))


def with_changes(truth, changes):
    """Other values of the objects' fields, made of their number."""
    count = len(truth.objects.labels)
    return replace(truth, objects=replace(truth.objects, **{name: make(count) for name, make in changes.items()}))


def changed(config: DetectConfig, fields: dict[str, object]) -> DetectConfig:
    """The config with other values of fields, by dotted names."""
    parts: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    own = parts.pop("", {})
    return replace(config, **own, **{part: replace(getattr(config, part), **values) for part, values in parts.items()})


def small(**changes: object) -> DetectConfig:
    """The demo's recipe, cut down to seconds."""
    fields = {
        "encoder.embed_dim": 16, "encoder.num_heads": (1, 2, 4), "augment.image_size": 64, "detector.fpn_dim": 16,
        "detector.box_dim": 16, "detector.mask_convs": 1, "detector.proposals": 30, "loop.batch_size": 4,
        "loop.steps": 6, "detector.norm": "group",
    }  # fmt: skip
    return changed(DETECT_RECIPES["demo_detect"](), {**fields, **changes})


def job_on(source: Source, folder: Path, **changes: object) -> DetectionJob:
    folder.mkdir(parents=True, exist_ok=True)
    return DetectionJob.of(small(**changes), source, source, data=None, folder=folder, pretrained=None)


def knowing(job: DetectionJob, monkeypatch, *, shift: float = 0.0) -> None:
    """Let the model find the truth."""
    truth = {
        item.pixels.tobytes(): item.objects for batch in job._images(np.arange(job.num_judged), None) for item in batch
    }

    def find(self: Finder, images: list[np.ndarray]) -> list[Detections]:
        found = []
        for pixels in images:
            objects = truth[pixels.tobytes()]
            masks = torch.zeros(len(objects.labels), 28, 28)
            for index, (mask, box) in enumerate(zip(objects.masks, objects.boxes.astype(int), strict=True)):
                part = torch.from_numpy(decode_rle(mask, pixels.shape[:2])[box[1] : box[3], box[0] : box[2]])
                masks[index] = torch.nn.functional.interpolate(part[None, None].float(), (28, 28), mode="area")[0, 0]
            boxes = torch.from_numpy(objects.boxes) + shift
            found.append(Detections(boxes, torch.ones(len(boxes)), torch.from_numpy(objects.labels), masks))
        return found

    monkeypatch.setattr(Finder, "find", find)


def test_a_model_that_knows_the_truth_scores_one(tmp_path, monkeypatch):
    job = job_on(scenes(tmp_path / "set", 9), tmp_path)
    knowing(job, monkeypatch)
    figures = job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)
    assert figures["val/box_ap"] == figures["val/box_ap50"] == pytest.approx(1.0)
    assert figures["val/mask_ap50"] == pytest.approx(1.0)
    assert figures["val/mask_ap"] > 0.8  # of 28 x 28 points
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["name"] for row in rows] == list(CLASS_NAMES)
    objects = np.concatenate([draw(0, index).truth.objects.labels for index in range(9)])
    assert [int(row["objects"]) for row in rows] == np.bincount(objects, minlength=6).tolist()
    assert {row["ap"] for row in rows} <= {"1.0000", ""}
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert len(predictions) == len(objects)
    assert {item["category_id"] for item in predictions} == {int(label) + 1 for label in objects}
    assert "(nothing)" in (tmp_path / "confusion.csv").read_text()


def test_uneven_shares_of_two_workers_are_the_whole(tmp_path, monkeypatch):
    """Seven images on two workers, one of which is broken: what they found is put together, whatever its length."""
    job = job_on(scenes(tmp_path / "set", 7, broken=4), tmp_path)
    knowing(job, monkeypatch, shift=2.0)
    model = build_seeded(job).eval()
    whole = job.evaluate(model, rank=0, num_workers=1)
    assert 0.1 < whole["val/box_ap"] < 0.99
    assert [record.reason for record in job.left_out(rank=0)] == [
        "it has no annotation that can be used (manifest.json of the shards says why)"
    ]

    shares: list[dict] = []
    monkeypatch.setattr(detection.dist, "broadcast", lambda buffer, src: None)
    monkeypatch.setattr(detection.dist, "broadcast_object_list", lambda answer, src: answer.__setitem__(0, {}))
    monkeypatch.setattr(detection.dist, "all_gather_object", lambda parts, own: (shares.append(own), _fill(parts, {})))
    for rank in range(2):
        job.evaluate(model, rank=rank, num_workers=2)
    assert [sorted(share) for share in shares] == [[0, 1, 2, 3], [5, 6]]
    monkeypatch.setattr(detection.dist, "broadcast_object_list", lambda answer, src: None)
    monkeypatch.setattr(detection.dist, "all_gather_object", lambda parts, own: _fill(parts, *shares))
    assert job.evaluate(model, rank=0, num_workers=2) == whole


def _fill(parts, *values):
    parts[:] = [*values, *values][: len(parts)]


def test_images_are_judged_at_their_own_size(tmp_path):
    """What is found on the canvas of 64 px is written in pixels of the image."""
    job = job_on(scenes(tmp_path / "set", 4, first=1), tmp_path, **{"detector.score_threshold": 0.0})
    job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    sizes = {index: draw(0, index).truth.size for index in range(1, 5)}
    assert {item["image_id"] for item in predictions} == set(sizes)
    for item in predictions:
        x, y, width, height = item["bbox"]
        assert x + width <= sizes[item["image_id"]][1] + 0.02
        assert y + height <= sizes[item["image_id"]][0] + 0.02
        assert tuple(item["segmentation"]["size"]) == sizes[item["image_id"]]
    assert max(item["bbox"][0] + item["bbox"][2] for item in predictions) > 100


def test_a_validation_set_that_cannot_be_used(tmp_path):
    job = replace(job_on(scenes(tmp_path / "set", 4), tmp_path), validation=scenes(tmp_path / "bad", 1, broken=0))
    with pytest.raises(TrainingStopped, match="No image of bad/train could be used"):
        job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)


def test_sets_that_cannot_be_learnt_from(tmp_path, shards):
    with pytest.raises(DataError, match="has no objects, and detection needs them"):
        job_on(open_source(shards("set", [0, 1, 2, 3] * 4)), tmp_path)
    with pytest.raises(DataError, match=r"are crowds \(iscrowd = 1\)"):
        job_on(scenes(tmp_path / "crowds", 8, crowd=lambda count: np.ones(count, dtype=bool)), tmp_path)
    bare = scenes(tmp_path / "bare", 8, masks=lambda count: (b"",) * count)
    with pytest.raises(DataError, match=r"have a box and no mask, such as in .*: give --detector\.no-masks"):
        job_on(bare, tmp_path)
    assert job_on(bare, tmp_path, **{"detector.masks": False}).num_classes == 6
    with pytest.raises(DataError, match="none of 1 images of empty/train has an object"):
        job_on(scenes(tmp_path / "empty", 1, first=_empty_scene()), tmp_path)


def _empty_scene() -> int:
    return next(index for index in range(100) if not len(draw(0, index).truth.objects.labels))


def test_without_pycocotools_the_run_does_not_begin(tmp_path, monkeypatch):
    def refuse():
        raise ValueError("pip install 'mixmae[dense]'")

    monkeypatch.setattr(detection, "require_pycocotools", refuse)
    with pytest.raises(DataError, match="dense"):
        job_on(scenes(tmp_path / "set", 4), tmp_path)


def test_a_panel_shows_truth_and_prediction(tmp_path, monkeypatch):
    job = job_on(scenes(tmp_path / "set", 20), tmp_path)
    panel, metrics = job.draw_panel(build_seeded(job).eval())
    assert metrics == {}
    assert len(job._shown) == 8
    assert panel.size[1] > 8 * 200
    left = np.asarray(panel.crop((6, 16, 326, panel.height)))
    knowing(job, monkeypatch)
    known = np.asarray(job.draw_panel(build_seeded(job).eval())[0])
    assert (known[16:, 6:326] == left).all()
    assert (known[16:, 332:652].astype(int) - left).mean() < 5  # the same boxes and masks, with scores


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_steps_that_are_resumed_are_the_same_bit_for_bit(tmp_path, norm):
    """Three steps, and the last two again from the weights after the first."""
    changes = {"encoder.drop_path": 0.2, "loop.steps": 3, "detector.norm": norm}
    job = job_on(scenes(tmp_path / "set", 12), tmp_path, **changes)
    whole, half = build_seeded(job), build_seeded(job)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, half)]
    _steps(job, whole, optimizers[0], 0, 3)
    _steps(job, half, optimizers[1], 0, 1)
    again = build_seeded(job)
    again.load_state_dict(half.state_dict())
    _steps(job, again, torch.optim.SGD(again.parameters(), lr=0.1), 1, 3)
    assert same(whole.state_dict(), again.state_dict())


def _steps(job: DetectionJob, model: torch.nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int):
    model.train()
    for index, batch in enumerate(batches_of(job, stop)):
        if index >= start:
            torch.manual_seed(index)
            job.step(model, batch, torch.Generator().manual_seed(index), 0).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_two_workers_compute_what_one_does(tmp_path):
    """Weights after two steps, with gloo, where one worker takes the same halves of each batch one after the other; one
    image in four has no object."""
    source = scenes(tmp_path / "set", 12, first=_empty_scene())
    config = {"optim.lr": 0.01, "loop.warmup_epochs": 0.0, "loop.steps": 2}
    job = job_on(source, tmp_path, **config, **{"loop.micro_batch_size": 2})
    model = build_seeded(job)
    train_in_process(job, model)
    script = Path(__file__).with_name("two_detectors.py")
    results = tmp_path / "results"
    results.mkdir()
    arguments = [str(tmp_path / "set"), json.dumps(config), str(results), str(tmp_path / "store")]
    workers = [subprocess.Popen([sys.executable, str(script), str(rank), *arguments]) for rank in range(2)]
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    states = [torch.load(results / f"{rank}.pt") for rank in range(2)]
    assert same(states[0], states[1])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name], value, atol=2e-4, rtol=1e-3, msg=name)
    both = [json.loads((results / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1] == job.evaluate(model.eval(), rank=0, num_workers=1)


def test_a_run_is_found_again(tmp_path):
    job = job_on(scenes(tmp_path / "set", 4), tmp_path / "run")
    model = build_seeded(job).eval()
    folder = tmp_path / "run/checkpoints/step_0000001"
    save_checkpoint(folder, model=model, optimizer=None, state=job.describe() | {"position": vars(TrainState(step=1))})
    (tmp_path / "run/run.json").write_text("{}")
    assert is_detection(tmp_path / "run")
    assert not is_detection(tmp_path / "set")
    finder = load_finder(tmp_path / "run", device="cpu")
    assert finder.class_names == CLASS_NAMES
    assert finder.category_ids == (1, 2, 3, 4, 5, 6)
    images = [item.pixels for item in job._shown]
    for one, two in zip(
        finder.find(images), finder_of(model, job.config, job.classes, job.category_ids).find(images), strict=True
    ):
        assert torch.equal(one.boxes, two.boxes)
        assert torch.equal(one.masks, two.masks)
    encoder, metadata = load_encoder(folder)  # the encoder can be taken out, as of any run
    assert metadata.preprocessing.image_size == (64, 64)
    assert torch.equal(encoder.state_dict()["norm.weight"], model.encoder.state_dict()["norm.weight"])


def test_recipes():
    config = DETECT_RECIPES["mixmae_swin_base_coco_55ep"]()
    own = replace(swin_base(), drop_path=0.1)
    assert config.adapted(own) == replace(with_dense_windows(own), image_size=1024) == config.encoder
    assert config.optim.peak_lr(64) == 8e-5
    assert config.loop.schedule == "step"
    with pytest.raises(ValueError, match="anchor_sizes has 3 levels"):
        small(**{"detector.anchor_sizes": (8, 16, 32), "detector.first_stage": 2})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_learns_eight_scenes_by_heart(tmp_path):
    source = RowRange(base=scenes(tmp_path / "set", 12, first=1), start=0, stop=8)
    recipe = changed(
        DETECT_RECIPES["demo_detect"](),
        {"loop.steps": 150, "augment.scale": (1.0, 1.0), "augment.flip": 0.0, "loop.warmup_epochs": 0.1},
    )
    job = DetectionJob.of(recipe, source, source, data=None, folder=tmp_path, pretrained=None)
    model = build_seeded(job)
    train_in_process(job, model)
    figures = job.evaluate(model.eval(), rank=0, num_workers=1)
    assert figures["val/box_ap50"] > 0.9
    assert figures["val/mask_ap50"] > 0.8


def saved(tmp_path: Path, source: Source) -> tuple[DetectionJob, torch.nn.Module, Path]:
    """An untrained run that finds something, and its checkpoint."""
    job = job_on(source, tmp_path / "run", **{"detector.score_threshold": 0.0})
    model = build_seeded(job).eval()
    folder = tmp_path / "run/checkpoints/step_0000001"
    save_checkpoint(folder, model=model, optimizer=None, state=job.describe() | {"position": vars(TrainState(step=1))})
    (tmp_path / "run/run.json").write_text(json.dumps({"data": {"source": "scenes"}}))
    return job, model, folder


def test_a_set_is_scored(tmp_path, monkeypatch, capsys):
    """pipelines/evaluate.py on a run, whose detections are then scored as if they were somebody else's."""
    from pipelines.evaluate import main

    job, model, folder = saved(tmp_path, scenes(tmp_path / "set", 6, broken=2))
    knowing(job, monkeypatch, shift=2.0)
    output = tmp_path / "out"
    data = ["--data", str(tmp_path / "set"), "--split", "train"]
    assert main([str(folder), *data, "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    expected = job.evaluate(model, rank=0, num_workers=1)
    assert {f"val/{name}": metrics[name] for name in ("box_ap", "mask_ap", "box_ap_small")}.items() <= expected.items()
    assert (metrics["num_judged"], metrics["num_broken"]) == (5, 1)
    assert len(list(csv.DictReader((output / "classes.csv").open()))) == 6
    theirs = ["--predictions", str(output / "predictions.json"), *data, "--output", str(tmp_path / "theirs")]
    assert main(theirs) == 0
    assert json.loads((tmp_path / "theirs/metrics.json").read_text())["mask_ap"] == metrics["mask_ap"]
    for arguments, words in (
        ([*theirs[:1], str(tmp_path / "gone.json"), *theirs[2:]], "gone.json cannot be read: No such file"),
        (data, "say what to judge"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def test_the_images_with_most_mistakes_are_shown(tmp_path):
    from pipelines.evaluate import main

    job, model, folder = saved(tmp_path, scenes(tmp_path / "set", 6))
    output = tmp_path / "out"
    assert main([str(folder), "--data", str(tmp_path / "set"), "--split", "train", "--output", str(output)]) == 0
    assert Image.open(output / "worst.png").size[1] > 500
    job.evaluate(model, rank=0, num_workers=1)
    assert "worst.png" in job.pictures
    assert Image.open(tmp_path / "run/worst.png").size == Image.open(output / "worst.png").size


def test_missed_invented_and_mistaken_objects_count(tmp_path):
    box = np.array([[10, 10, 30, 30]], dtype=np.float32)
    truths = [
        ImageTruth(number, (64, 64), box, np.array([0]), np.array([400.0]), np.array([False]), (b"",))
        for number in (70, 71, 72, 73)
    ]

    def guess(category, x=10, score=0.9):
        return {"image_id": 0, "category_id": category, "bbox": [x, 10, 20, 20], "score": score}

    found = {
        3: [guess(5)],  # right
        4: [],  # missed
        6: [guess(5), guess(5, x=40), guess(8, x=40)],  # two invented
        9: [guess(8), guess(5, x=40, score=0.1)],  # mistaken, and a guess that is not shown
    }
    assert detection.worst_rows(truths, found, (5, 8)) == [6, 4, 9, 3]


def test_objects_are_found_in_any_images(tmp_path):
    from pipelines.predict import main

    job, model, _ = saved(tmp_path, scenes(tmp_path / "set", 4))
    photos = tmp_path / "photos/deep"
    photos.mkdir(parents=True)
    for index in range(3):
        (photos / f"{index}.jpg").write_bytes(draw(0, 50 + index).jpeg)
    (photos / "bad.jpg").write_bytes(b"no image")
    output = tmp_path / "out"
    assert main([str(tmp_path / "run"), str(tmp_path / "photos"), "--output", str(output)]) == 0
    rows = json.loads((output / "predictions.json").read_text())
    listed = json.loads((output / "images.json").read_text())
    assert len(listed["images"]) == 3
    assert [item["name"] for item in listed["categories"]] == list(CLASS_NAMES)
    names = {item["id"]: item["file_name"] for item in listed["images"]}
    finder = finder_of(model, job.config, job.classes, job.category_ids)
    for number, name in names.items():
        pixels = np.asarray(Image.open(tmp_path / "photos" / name))
        (expected,) = finder.find([pixels])
        own = [row for row in rows if row["image_id"] == number]
        assert len(own) == len(expected.scores)
        assert own[0]["bbox"][:2] == pytest.approx(expected.boxes[0, :2].tolist(), abs=0.02)
        assert (output / "overlays" / name).with_suffix(".png").is_file()
    table = list(csv.DictReader((output / "predictions.csv").open()))
    assert [bool(row["problem"]) for row in table].count(True) == 1


def test_objects_out_of_the_anchors_reach_are_told_of(tmp_path):
    source = scenes(tmp_path / "set", 12)
    known = [draw(0, index).truth for index in range(12)]
    sides = np.concatenate(
        [
            64 / max(truth.size) * np.sqrt((truth.objects.boxes[:, 2:] - truth.objects.boxes[:, :2]).prod(axis=1))
            for truth in known
        ]
    )
    line = job_on(source, tmp_path / "run").sizes_line
    assert f"5% {np.quantile(sides, 0.05):.0f}, 50% {np.quantile(sides, 0.5):.0f}" in line
    assert "anchors of 16 to 128 px" in line
    for name, sizes, remedy in (
        ("large", (100, 200, 300, 400), "smaller --detector"),
        ("small", (1, 2, 3, 4), "larger"),
    ):
        far = job_on(source, tmp_path / name, **{"detector.anchor_sizes": sizes}).sizes_line
        share = (sides < 50).mean() if name == "large" else (sides > 8).mean()
        assert f"note: {share:.0%} of the objects" in far
        assert f"give {remedy}" in far
