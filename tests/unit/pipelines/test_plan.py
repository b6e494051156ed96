"""What plan.py says, for a small recipe."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mixmae.cost import CARDS, GIB, USABLE_MEMORY
from mixmae.jobs.estimate import build_on_meta, cost_of
from mixmae.jobs.record import compared_with_plan
from pipelines import plan
from pipelines.recipes import DETECT_RECIPES, PRETRAIN_RECIPES
from tests.factories import jpeg

DEMO = ("demo", "--gpus", "2", "--card", "L4")


def lines(capsys) -> dict[str, str]:
    """What was printed, by the first word of each line."""
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")}


def test_a_plan_on_cards_and_the_run_that_finds_it(capsys, tmp_path):
    assert plan.main([*DEMO, "--reach", "0.25", "--output", str(tmp_path / "run")]) == 0
    said = lines(capsys)
    assert "1281167 (ImageNet-1K), 1500 steps of 32" in said["images"]
    assert "2 x L4, 1 micro-batch of 16 images each, float32" in said["per"]
    assert "--loop.precision bfloat16" in said["cheaper"] or "--method.pairing once" in said["cheaper"]
    written = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert written["images_per_s"] == pytest.approx(0.25 * written["bound"])
    assert written["hours"] == pytest.approx(1500 * 32 / written["images_per_s"] / 3600)
    reached = compared_with_plan(tmp_path / "run", written["images_per_s"] / 2)
    assert reached == {"plan/images_per_s": written["images_per_s"], "plan/reached": 0.5}
    assert compared_with_plan(tmp_path, 1.0) == {}


@pytest.mark.parametrize(
    ("recipe", "images", "reading", "rate"),
    [
        ("demo_segment", "20210 (ADE20K), 600 steps of 8", "1 GB", 69),
        ("demo_detect", "118287 (COCO 2017), 500 steps of 8", "19 GB", 38),
    ],
)
def test_a_plan_of_a_dense_task(capsys, tmp_path, recipe, images, reading, rate):
    flags = ["--gpus", "2", "--card", "L4", "--output", str(tmp_path / "run")]
    assert plan.main([recipe, *flags]) == 0
    text = capsys.readouterr().out
    assert images in text
    assert "2 x L4, 1 micro-batch of 4 images each, float32" in text
    assert f"reading      {reading} per epoch" in text
    assert f"cores at {rate} images/s each (docs/benchmarks" in text
    assert "all 64 regions for boxes and 16 for masks" in text or recipe == "demo_segment"
    assert "--loop.precision bfloat16" in text
    assert json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["recipe"] == recipe


def test_what_fits_can_be_run(capsys, monkeypatch):
    """The size that is named divides the batch, as a run needs it, though more images would fit."""
    flags = ["--gpus", "1", "--card", "L4", "--decode-rate", "100"]
    one, two = (cost_of(DETECT_RECIPES["demo_detect"](), size, 80, card=CARDS["L4"]).peak for size in (1, 2))
    room = one + 4.5 * (two - one)  # for 5 images of 8
    small = dataclasses.replace(CARDS["L4"], memory_gib=room / GIB / USABLE_MEMORY)
    monkeypatch.setitem(plan.CARDS, "L4", small)
    assert plan.main(["demo_detect", *flags]) == 1
    text = capsys.readouterr().out
    assert "this does NOT fit: --loop.micro-batch-size 4 fits" in text
    assert "cores at 100 images/s each" in text


def test_a_step_that_does_not_fit_says_what_does(capsys, monkeypatch):
    small = dataclasses.replace(CARDS["L4"], memory_gib=0.06)
    monkeypatch.setitem(plan.CARDS, "L4", small)
    assert plan.main([*DEMO, "--loop.batch-size", "512"]) == 1
    text = capsys.readouterr().out
    assert "this does NOT fit: --loop.micro-batch-size " in text
    size = int(text.split("--loop.micro-batch-size ")[1].split()[0])
    assert 0 < size < 256
    assert plan.main([*DEMO, "--loop.batch-size", "512", "--loop.micro-batch-size", str(size)]) == 0


def test_workers_that_share_out_the_model_need_less_memory():
    config = PRETRAIN_RECIPES["demo"]()
    sharing = dataclasses.replace(config, loop=dataclasses.replace(config.loop, shard=True))
    whole, alone, part = cost_of(config, 4, 10), cost_of(sharing, 4, 10), cost_of(sharing, 4, 10, workers=2)
    assert alone == whole
    assert part.state == pytest.approx(whole.state / 2, abs=2)
    model = build_on_meta(config, 10)
    blocks = [block for stage in model.encoder.stages for block in stage.blocks]
    sizes = sorted(4 * sum(weight.numel() for weight in block.parameters()) for block in blocks)
    gathered = 4 * sum(weight.numel() for weight in model.parameters()) - sum(sizes[:-2])
    assert whole.peak - part.peak == pytest.approx((whole.weights + whole.optimizer - gathered) / 2, abs=2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gpus", "-1"], "give 0 or more"),
        (["--reach", "0"], "above 0 and at most 1"),
        (["--decode-rate", "0"], "must be above 0"),
        (["--gpus", "3000"], "3000"),
    ],
)
def test_mistakes_are_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        plan.main([*DEMO, *flags])
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_on_cores_is_of_steps_made_here(capsys, tmp_path):
    for number in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number, 80, 80))
    flags = ["--gpus", "0", "--workers", "2", "--data", str(tmp_path / "images"), "--output", str(tmp_path / "run")]
    assert plan.main(["demo", *flags, "--loop.batch-size", "8"]) == 0
    said = lines(capsys)
    assert "2 processes of" in said["per"]
    assert "decoded per core" in said["speed"]
    written = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert written["bound"] is None
    assert written["workers"] == 2
    assert 1 < written["images_per_s"] < 1e5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo_segment", "demo_detect"])
def test_a_plan_of_a_dense_task_on_cores_is_of_the_built_in_scenes(capsys, tmp_path, recipe):
    flags = ["--gpus", "0", "--workers", "1", "--output", str(tmp_path / "run"), "--loop.batch-size", "2"]
    assert plan.main([recipe, *flags]) == 0
    said = lines(capsys)
    assert "2000 (scenes/train)" in said["images"]
    assert "decoded per core" in said["speed"]
    assert json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["images_per_s"] > 0.1
