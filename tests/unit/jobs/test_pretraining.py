"""A pretraining as its workers run it, without Ray: grey images through an encoder of one channel, to the panel."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mixmae.data.blocks import local_batches
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.order import Plan
from mixmae.data.source import DataError
from mixmae.data.sources import open_source
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.pretraining import PretrainJob
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.probing.online import OnlineProbeConfig
from mixmae.training.loop import LoopConfig, Silent, TrainState, train
from mixmae.training.optim import build_optimizer
from pipelines.recipes import PRETRAIN_RECIPES
from tests.factories import DECODER, tiny_swin


@pytest.fixture
def grey(tmp_path):
    """80 grey PNGs of 40 px in four classes, every second one of 16 bits."""
    images = []
    for row in range(80):
        low = np.random.default_rng(row).integers(60 * (row % 4), 60 * (row % 4) + 75, (5, 5), dtype=np.uint8)
        image = Image.fromarray(low).resize((40, 40), Image.Resampling.BICUBIC)
        if row % 2:
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        out = io.BytesIO()
        image.save(out, "PNG")
        images.append({"bytes": out.getvalue(), "path": f"{row}.png"})
    labels = [row % 4 for row in range(80)]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "train-0.parquet", row_group_size=20)
    return open_source(tmp_path)


class Losses(Silent):
    """The loop's Events: keeps the loss of each step."""

    def __init__(self):
        self.values = []

    def log(self, step, record, broken):
        self.values.append(record["loss"])


def test_ten_steps_on_grey_images(grey, tmp_path):
    config = PretrainConfig(
        encoder=tiny_swin(64, in_channels=1).config,
        method=MixMAEConfig(num_images=2, decoder=DECODER),
        augment=AugmentConfig(image_size=64),
        loop=LoopConfig(steps=10, batch_size=8, log_every_steps=1),
        probe=OnlineProbeConfig(images=80),
    )
    job = PretrainJob.of(config, grey, grey, data=None, folder=tmp_path / "run")
    torch.manual_seed(0)
    model, events = job.build_model(), Losses()
    plan = Plan(chunk_sizes=grey.chunk_sizes, seed=0, window_rows=40)
    train(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        peak_lr=2e-3,
        clip_grad_norm=None,
        step_function=job.step,
        batches=local_batches(grey, plan, config.augment, share=config.share(num_workers=1), stop_step=10, channels=1),
        state=TrainState(),
        config=job.loop,
        length=job.length,
        events=events,
        device=torch.device("cpu"),
    )
    assert events.values[-1] < events.values[0] - 0.02
    model.eval()
    with torch.no_grad():
        panel, metrics = job.draw_panel(model)
    assert np.isfinite(metrics["heldout/loss"])
    pixels = np.asarray(panel.crop((7, 17, 69, 79)))  # the first original, without the outlines of its cells
    inside = pixels[2:28, 2:28].astype(int)
    assert (inside == inside[..., :1]).all()
    assert inside.std() > 1
    assert job.evaluate(model, rank=0, num_workers=1)["probe/knn_top1"] > 0.5  # brightness tells the class
    assert "in_channels" in job.params["encoder"]


def test_colours_are_refused_before_a_run_of_one_channel(shards, tmp_path):
    config = PRETRAIN_RECIPES["demo"]()
    config = replace(config, encoder=replace(config.encoder, in_channels=1))
    source = open_source(shards("set", [row % 4 for row in range(120)]))
    with pytest.raises(DataError, match=r"--encoder\.in-channels 3"):
        PretrainJob.of(config, source, source, data=None, folder=tmp_path)


def test_broken_images_alone_are_refused(shards, tmp_path):
    source = open_source(shards("set", [row % 4 for row in range(120)], broken=120))
    with pytest.raises(DataError, match=r"32 of 32 images of set/train .* could not be used, for example .*not an"):
        PretrainJob.of(PRETRAIN_RECIPES["demo"](), source, source, data=None, folder=tmp_path)


def test_broken_held_out_images_are_in_no_figure_and_named(shards, tmp_path):
    """Panel, loss and probe are those of the whole images alone; the probe takes its images from all workers' parts."""
    labels = [row % 2 for row in range(60)]
    config = PretrainConfig(
        encoder=tiny_swin(64).config,
        method=MixMAEConfig(num_images=2, decoder=DECODER),
        augment=AugmentConfig(image_size=64),
        loop=LoopConfig(steps=10, batch_size=8),
        probe=OnlineProbeConfig(images=60, k=5),
    )
    found = []
    for name, broken in (("set", 20), ("rest", 0)):
        folder = shards(name, labels if broken else labels[20:], broken=broken)
        if not broken:  # the images that are whole in the other set
            table = pq.read_table(tmp_path / "set" / "train-0.parquet").slice(20)
            pq.write_table(table, folder / "train-0.parquet", row_group_size=16)
        source = open_source(folder)
        job = PretrainJob.of(config, source, source, data=None, folder=tmp_path / "run")
        torch.manual_seed(0)
        model = job.build_model().eval()
        metrics = job.evaluate_untrained(model, rank=0, num_workers=1)
        with torch.no_grad():
            panel, losses = job.draw_panel(model)
        found.append(({**metrics, **losses, "perf/probe_s": 0}, panel.tobytes(), job.left_out(rank=0)))
    (metrics, panel, broken), (expected, expected_panel, none) = found
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert panel == expected_panel
    assert [record.row for record in broken] == list(range(20))
    assert none == []
