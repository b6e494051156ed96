"""A segmentation run as its workers see it: steps, evaluation, panels, weights; and that it learns."""

from __future__ import annotations

import csv
import io
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
from mixmae.data.shards.scenes import DENSE, draw
from mixmae.data.shards.write import StoredImage, shard_schema, write_shard
from mixmae.data.source import DataError, RowRange, Source
from mixmae.data.sources import open_source
from mixmae.data.truth import Truth
from mixmae.encoders.build import config_at_size
from mixmae.encoders.swin import swin_base, with_dense_windows
from mixmae.jobs import segmentation
from mixmae.jobs.config import SegmentConfig
from mixmae.jobs.in_process import batches_of, build_seeded, train_in_process
from mixmae.jobs.segmentation import SegmentationJob
from mixmae.jobs.segmenter import is_segmentation, load_segmenter, segmenter_of
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.failures import TrainingStopped
from mixmae.training.loop import TrainState
from pipelines.recipes import SEGMENT_RECIPES
from tests.factories import same


def scenes(folder: Path, count: int, first: int = 0, broken: int = -1) -> Source:
    """A set of the built-in scenes; one of them has no mask."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw(0, first + index) for index in range(count)]
    images = [
        StoredImage(scene.jpeg, f"{index}.jpg", truth=Truth() if index == broken else scene.truth)
        for index, scene in enumerate(drawn)
    ]
    write_shard(folder / "train-00000-of-00001.parquet", images, shard_schema(None, dense=DENSE))
    return open_source(str(folder))


def changed(config: SegmentConfig, fields: dict[str, object]) -> SegmentConfig:
    """The config with other values of fields, by dotted names."""
    parts: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    own = parts.pop("", {})
    return replace(config, **own, **{part: replace(getattr(config, part), **values) for part, values in parts.items()})


def small(**changes: object) -> SegmentConfig:
    """The demo's recipe, cut down to seconds."""
    fields = {
        "encoder.embed_dim": 16, "encoder.num_heads": (1, 2, 4), "augment.image_size": 64, "augment.shorter_px": 64,
        "augment.longer_px": 96, "head.channels": 16, "head.aux_channels": 8, "slide_stride": 48, "loop.batch_size": 4,
        "loop.steps": 6,
    }  # fmt: skip
    return changed(SEGMENT_RECIPES["demo_segment"](), {**fields, **changes})


def job_on(source: Source, folder: Path, **changes: object) -> SegmentationJob:
    folder.mkdir(parents=True, exist_ok=True)
    return SegmentationJob.of(small(**changes), source, source, data=None, folder=folder, pretrained=None)


def test_shares_of_the_validation_set_add_up_to_the_whole(tmp_path, monkeypatch):
    """Three workers on seven images, one of which has no mask: their counts of pixels are those of one worker."""
    job = job_on(scenes(tmp_path / "set", 7, broken=4), tmp_path)
    model = build_seeded(job).eval()
    with torch.no_grad():
        model.head.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    shown: list[list[int]] = []
    panel_of = segmentation.panel_of
    monkeypatch.setattr(
        segmentation, "panel_of", lambda *given: (shown.append([pair.row for pair in given[1]]), panel_of(*given))[1]
    )
    whole = job.evaluate(model, rank=0, num_workers=1)
    assert [record.reason for record in job.left_out(rank=0)] == [
        "it has no annotation that can be used (manifest.json of the shards says why)"
    ]

    parts: list[torch.Tensor] = []
    monkeypatch.setattr(segmentation.dist, "all_reduce", lambda sums: parts.append(sums.clone()))
    monkeypatch.setattr(segmentation.dist, "broadcast", lambda buffer, src: None)
    worst: list[list[tuple[float, int]]] = []

    def gather(everybodys, own):
        worst.append(own)
        everybodys[:] = worst[:3] if len(worst) > 3 else [own] * 3

    monkeypatch.setattr(segmentation.dist, "all_gather_object", gather)
    for rank in range(3):
        job.evaluate(model, rank=rank, num_workers=3)
    assert [sorted(row for _, row in part) for part in worst] == [[0, 1, 2], [3], [5, 6]]
    counts = parts.copy()
    job.evaluate(model, rank=0, num_workers=3)  # with what the others found
    assert shown[-1] == shown[0]
    assert sorted(shown[0]) == [0, 1, 2, 3, 5, 6]
    parts = counts
    confusion, loss = sum(parts[::2]), sum(parts[1::2])
    assert {tuple(part.sum(dim=1).tolist()) for part in parts[::2]} != {tuple(confusion.sum(dim=1).tolist())}
    right, truth, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou = right.double() / (truth + predicted - right)
    assert iou.nanmean().item() == whole["val/miou"]
    assert right.sum().item() / confusion.sum().item() == pytest.approx(whole["val/aacc"])
    assert loss.item() / confusion.sum().item() == pytest.approx(whole["val/loss"])


def test_every_pixel_of_every_image_is_judged_at_its_own_size(tmp_path):
    source = scenes(tmp_path / "set", 5)
    job = job_on(source, tmp_path)
    job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["name"] for row in rows] == list(job.classes) == ["ground", *DENSE.objects]
    sizes = [draw(0, index).truth.size for index in range(5)]
    assert sum(int(row["pixels"]) for row in rows) == sum(height * width for height, width in sizes)


def test_the_images_with_the_most_wrong_pixels_are_shown(tmp_path, monkeypatch):
    """The worst first, whatever batch or row they come in."""
    job = job_on(scenes(tmp_path / "set", 30), tmp_path)
    wrong = {row: (7 * row) % 30 / 30 for row in range(30)}  # share of the pixels
    shown: list[int] = []
    rows = {pair.pixels.tobytes(): pair for batch in job._pairs(np.arange(30), None) for pair in batch}

    def scores(self, images):
        found = []
        for pixels in images:
            pair = rows[pixels.tobytes()]
            indices = torch.from_numpy(pair.indices).long()
            indices.view(-1)[: int(wrong[pair.row] * indices.numel())] += 1
            found.append(torch.nn.functional.one_hot(indices % 7, 7).permute(2, 0, 1).float())
        return found

    def panel_of(segmenter, pairs):
        shown[:] = [pair.row for pair in pairs]
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(segmentation.Segmenter, "scores", scores)
    monkeypatch.setattr(segmentation, "panel_of", panel_of)
    job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)
    assert shown == sorted(range(30), key=lambda row: -wrong[row])[:20]
    assert "worst.png" in job.pictures
    assert (tmp_path / "worst.png").exists()


def test_a_model_that_knows_the_truth_scores_one(tmp_path, monkeypatch):
    job = job_on(scenes(tmp_path / "set", 5), tmp_path)
    truth = {pair.pixels.tobytes(): pair.indices for pair in job._shown}

    def scores(self, images):
        maps = [torch.from_numpy(truth[pixels.tobytes()]).long() for pixels in images]
        return [20.0 * torch.nn.functional.one_hot(indices, 7).permute(2, 0, 1) for indices in maps]

    monkeypatch.setattr(segmentation.Segmenter, "scores", scores)
    figures = job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)
    assert figures["val/miou"] == figures["val/macc"] == figures["val/aacc"] == 1
    assert figures["val/loss"] < 1e-6


def test_a_validation_set_that_cannot_be_used(tmp_path):
    job = replace(job_on(scenes(tmp_path / "set", 4), tmp_path), validation=scenes(tmp_path / "bad", 1, broken=0))
    with pytest.raises(TrainingStopped, match="No image of bad/train could be used"):
        job.evaluate(build_seeded(job).eval(), rank=0, num_workers=1)


def test_sets_of_other_classes(tmp_path, shards):
    with pytest.raises(DataError, match="has no masks of classes"):
        job_on(open_source(shards("set", [0, 1, 2, 3] * 4)), tmp_path)


def test_parameters_for_comparisons(tmp_path):
    params = job_on(scenes(tmp_path / "set", 5), tmp_path).params
    assert params["model_params_m"] > params["params_m"] > 0
    assert params["model_gmacs"] > params["gmacs"] > 0
    assert params["lr"] == 0.01


def test_a_panel_shows_truth_and_prediction(tmp_path):
    job = job_on(scenes(tmp_path / "set", 20), tmp_path)
    panel, metrics = job.draw_panel(build_seeded(job).eval())
    assert metrics == {}
    assert len(job._shown) == 8
    assert panel.size[1] > 8 * 100


def test_two_workers_compute_what_one_does(tmp_path):
    """Losses and weights after two steps, with gloo: padding differs between the halves of a batch, so their shares of
    counted pixels do, too."""
    source = scenes(tmp_path / "set", 12)
    config = {"augment.scale": (0.3, 1.5), "head.dropout": 0.0, "optim.lr": 0.01, "loop.warmup_epochs": 0.0}
    job = job_on(source, tmp_path, **config)
    model = build_seeded(job)
    train_in_process(replace(job, config=changed(job.config, {"loop.steps": 2})), model)
    script = Path(__file__).with_name("two_workers.py")
    results = tmp_path / "results"
    results.mkdir()
    store = tmp_path / "store"
    arguments = [str(tmp_path / "set"), json.dumps({**config, "loop.steps": 2}), str(results), str(store)]
    workers = [subprocess.Popen([sys.executable, str(script), str(rank), *arguments]) for rank in range(2)]
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    states = [torch.load(results / f"{rank}.pt") for rank in range(2)]
    assert same(states[0], states[1])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_steps_that_are_resumed_are_the_same_bit_for_bit(tmp_path):
    """Three steps, and the last two again from the weights after the first."""
    job = job_on(scenes(tmp_path / "set", 12), tmp_path, **{"encoder.drop_path": 0.2, "loop.steps": 3})
    whole, half = build_seeded(job), build_seeded(job)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, half)]
    _steps(job, whole, optimizers[0], 0, 3)
    _steps(job, half, optimizers[1], 0, 1)
    again = build_seeded(job)
    again.load_state_dict(half.state_dict())
    _steps(job, again, torch.optim.SGD(again.parameters(), lr=0.1), 1, 3)
    assert same(whole.state_dict(), again.state_dict())


def _steps(job: SegmentationJob, model: torch.nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int):
    model.train()
    for index, batch in enumerate(batches_of(job, stop)):
        if index >= start:
            torch.manual_seed(index)
            job.step(model, batch, torch.Generator(), 0).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_run_is_found_again(tmp_path):
    job = job_on(scenes(tmp_path / "set", 4), tmp_path / "run")
    model = build_seeded(job).eval()
    folder = tmp_path / "run/checkpoints/step_0000001"
    save_checkpoint(folder, model=model, optimizer=None, state=job.describe() | {"position": vars(TrainState(step=1))})
    (tmp_path / "run/run.json").write_text("{}")
    assert is_segmentation(tmp_path / "run")
    assert not is_segmentation(tmp_path / "set")
    segmenter = load_segmenter(tmp_path / "run", device="cpu")
    assert segmenter.class_names == tuple(job.classes)
    images = [pair.pixels for pair in job._shown]
    for one, two in zip(
        segmenter.predict(images), segmenter_of(model, job.config, job.classes).predict(images), strict=True
    ):
        assert (one == two).all()
    encoder, metadata = load_encoder(folder)  # the encoder can be taken out, as of any run
    assert metadata.preprocessing.image_size == (64, 64)
    assert torch.equal(encoder.state_dict()["norm.weight"], model.encoder.state_dict()["norm.weight"])


def test_the_recipes_windows_go_on_an_encoder_of_its_size():
    config = SEGMENT_RECIPES["mixmae_swin_base_ade20k_160k"]()
    own = replace(swin_base(), drop_path=0.2)
    assert config.adapted(own) == replace(with_dense_windows(own), image_size=512) == config.encoder
    demo = SEGMENT_RECIPES["demo_segment"]()
    assert demo.adapted(own) == config_at_size(own, 128)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"slide_stride": 65}, "between 1 and the side"), ({"ema_decay": 1.0}, "ema_decay"), ({"divergence": 1.0}, "div")],
)
def test_settings_that_make_no_sense(change, words):
    with pytest.raises(ValueError, match=words):
        small(**change)


def test_batch_norms_need_two_images():
    config = small(**{"head.norm": "batch"})
    config.share(num_workers=2)
    with pytest.raises(ValueError, match="need two images at once"):
        config.share(num_workers=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns_eight_scenes_by_heart(tmp_path):
    source = RowRange(base=scenes(tmp_path / "set", 12, first=1), start=0, stop=8)
    recipe = changed(
        SEGMENT_RECIPES["demo_segment"](),
        {"loop.steps": 600, "augment.scale": (1.0, 1.0), "augment.flip": 0.0, "augment.max_class_share": 1.0,
         "head.dropout": 0.0, "optim.lr": 0.01},
    )  # fmt: skip
    job = SegmentationJob.of(recipe, source, source, data=None, folder=tmp_path, pretrained=None)
    model = build_seeded(job)
    train_in_process(job, model)
    assert job.evaluate(model.eval(), rank=0, num_workers=1)["val/miou"] > 0.85


def test_masks_are_written_as_indices(tmp_path):
    """pipelines/predict.py on a run: a PNG of indices for each image, the same as the model's."""
    from pipelines.predict import main

    job = job_on(scenes(tmp_path / "set", 4), tmp_path / "run")
    model = build_seeded(job).eval()
    folder = tmp_path / "run/checkpoints/step_0000001"
    save_checkpoint(folder, model=model, optimizer=None, state=job.describe() | {"position": vars(TrainState(step=1))})
    (tmp_path / "run/run.json").write_text(json.dumps({"data": {"source": "scenes"}}))
    photos = tmp_path / "photos/deep"
    photos.mkdir(parents=True)
    for index in range(3):
        (photos / f"{index}.jpg").write_bytes(draw(0, 50 + index).jpeg)
    Image.open(photos / "0.jpg").save(photos / "0.png")
    (photos / "bad.jpg").write_bytes(b"no image")
    output = tmp_path / "out"
    assert main([str(tmp_path / "run"), str(tmp_path / "photos"), "--output", str(output)]) == 0
    rows = list(csv.DictReader((output / "predictions.csv").open()))
    assert len(rows) == 5
    assert [bool(row["problem"]) for row in rows] == ["bad.jpg" in row["file"] for row in rows]
    masks = [row["mask"] for row in rows if row["mask"]]
    assert len(set(masks)) == 4
    segmenter = load_segmenter(tmp_path / "run", device="cpu")
    for row in rows:
        if row["mask"]:
            pixels = np.asarray(Image.open(row["file"]).convert("RGB"))
            written = np.asarray(Image.open(output / row["mask"]))
            assert written.shape == pixels.shape[:2]
            assert (written == segmenter.predict([pixels])[0]).mean() > 0.99
            assert (output / row["mask"].replace("masks/", "overlays/")).is_file()
    assert (output / "classes.txt").read_text().splitlines() == list(job.classes)


def test_a_set_is_scored(tmp_path):
    from pipelines.evaluate import main

    source = scenes(tmp_path / "set", 6, broken=2)
    job = job_on(source, tmp_path / "run")
    model = build_seeded(job).eval()
    folder = tmp_path / "run/checkpoints/step_0000001"
    save_checkpoint(folder, model=model, optimizer=None, state=job.describe() | {"position": vars(TrainState(step=1))})
    output = tmp_path / "out"
    assert main([str(folder), "--data", str(tmp_path / "set"), "--split", "train", "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    expected = job.evaluate(model, rank=0, num_workers=1)
    assert metrics["miou"] == pytest.approx(expected["val/miou"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(expected["val/loss"])
    assert (metrics["num_judged"], metrics["num_broken"]) == (5, 1)
    assert len(list(csv.DictReader((output / "classes.csv").open()))) == 7
    assert Image.open(output / "worst.png").size[1] > 300


def test_a_folder_as_ade20k_unpacks_is_packed_and_trained_on(tmp_path):
    """With a missing mask, a label too many, a broken image, and a photo that is turned by its EXIF orientation."""
    from mixmae.data.prepare import open_for_training

    root = tmp_path / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 12), ("validation", "val", 6)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            scene = draw(0, index)
            name = f"ADE_{short}_{index:08d}"
            (root / "images" / split / f"{name}.jpg").write_bytes(scene.jpeg)
            indices = np.asarray(Image.open(io.BytesIO(scene.truth.segmentation)))
            Image.fromarray(indices + 100 * (short == "val" and index == 1)).save(
                root / "annotations" / split / f"{name}.png"
            )
    (root / "annotations/training/ADE_train_00000002.png").unlink()
    (root / "images/training/ADE_train_00000003.jpg").write_bytes(b"no image")
    wrong = root / "annotations/training/ADE_train_00000004.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(wrong)), 200)).save(wrong)
    turned, exif = root / "images/validation/ADE_val_00000000.jpg", Image.Exif()
    exif[0x0112] = 8
    with Image.open(turned) as image:
        image.load()
        image.save(turned, exif=exif, quality=90)

    source, validation = open_for_training(str(root), tmp_path / "data", 1000)
    assert (source.num_rows, validation.num_rows) == (11, 6)
    config = changed(small(), {"loop.max_broken_fraction": 0.5, "loop.steps": 2})
    job = SegmentationJob.of(config, source, validation, data=str(root), folder=tmp_path, pretrained=None)
    assert job.num_classes == 150
    assert any("images have no mask" in note.what for note in job.account.notes)
    model = build_seeded(job)
    broken = [record for batch in batches_of(job, 4) for record in batch.broken]
    assert {record.reason.partition(" that")[0] for record in broken} == {"it has no annotation", "not an image"}
    train_in_process(job, model)
    figures = job.evaluate(model.eval(), rank=0, num_workers=1)
    assert 0 <= figures["val/miou"] < 0.5
    assert not job.left_out(rank=0)  # the turned photo and the large class can be used
    height, width = draw(0, 0).truth.size
    assert (width, height) in {pair.indices.shape for pair in job._shown}
