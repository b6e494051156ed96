"""Detection end to end on some of the built-in scenes: a real Ray cluster, a real MLflow server, as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.factories import same
from tests.ray.conftest import Finished, command, has_checkpoint, interrupt, run

pytest.importorskip("pycocotools")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = [
    *("--augment.image-size", "64", "--encoder.embed-dim", "16", "--encoder.num-heads", "1", "2", "4"),
    *("--encoder.drop-path", "0.2", "--detector.fpn-dim", "16", "--detector.box-dim", "16", "--detector.norm", "group"),
    *("--detector.anchor-sizes", "8", "16", "32", "--ema-decay", "0.9", "--detector.score-threshold", "0"),
    *("--detector.detections", "10"),
    *("--loop.batch-size", "8", "--loop.micro-batch-size", "4", "--loop.steps", "24", "--loop.log-every-steps", "4"),
]
"""The demo recipe, cut down to seconds. Micro-batches of one size make one worker's run the same as two workers'."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mlflow_server, few_scenes) -> Finished:
    base = tmp_path_factory.mktemp("runs")
    arguments = ["--mlflow-uri", mlflow_server, "--data", str(few_scenes), *SHORT]
    (base / "whole").mkdir()
    (base / "whole" / "plan.json").write_text('{"images_per_s": 40}')
    done = run("demo_detect", "--output", base / "whole", *arguments, "--workers", "1", cwd=base, pipeline="detect")
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(base / "whole", mlflow_server, arguments, done.stdout)


def test_the_run_says_and_keeps_what_it_did(finished):
    assert "6 classes of objects, validation on 40 images" in finished.text
    assert "Finished in" in finished.text
    assert "planned 40 images/s, ran at" in finished.text
    assert finished.state["metrics"]["plan/reached"] > 0
    state = finished.state
    assert state["classes"] == ["disc", "square", "triangle", "star", "ring", "plus"]
    assert 0 <= state["metrics"]["final/box_ap"] <= state["metrics"]["best/box_ap"]
    assert {"final/mask_ap", "final/box_ap_small"} <= state["metrics"].keys()
    assert [step for step, _ in finished.curve("val/box_ap")] == [6, 12, 18, 24]
    assert finished.curve("ap/disc")
    assert finished.curve("val_ema/box_ap")
    assert finished.curve("train/proposal_recall")
    assert finished.curve("loss/mask")
    assert len(list((finished.output / "panels").glob("*.png"))) == 4
    assert len((finished.output / "classes.csv").read_text().splitlines()) == 7
    assert {"classes.csv", "worst.png"} <= finished.artifacts
    predictions = json.loads((finished.output / "predictions.json").read_text())
    assert {item["image_id"] for item in predictions} <= set(range(2000, 2040))  # the scenes' own numbers


def test_two_workers_begin_with_the_same_losses_and_an_interruption_changes_nothing(finished):
    base = finished.output.parent
    both = base / "both"
    done = run("demo_detect", "--output", both, *finished.arguments, "--workers", "2", cwd=base, pipeline="detect")
    assert done.returncode == 0, done.stdout + done.stderr
    two = Finished(both, finished.server, finished.arguments, done.stdout)
    # Later ones may differ more: a proposal that is chosen or not, by a rounding, changes a step.
    for name in ("train/loss", "loss/rpn_obj", "loss/cls", "loss/mask"):
        (_, one), (_, other) = (run_.curve(name)[0] for run_ in (finished, two))
        assert one == pytest.approx(other, rel=1e-4), name

    parts = base / "parts"
    program = command("demo_detect", "--output", parts, *finished.arguments, "--workers", "1", pipeline="detect")
    status, _ = interrupt(program, lambda: has_checkpoint(parts), cwd=base)
    assert status == 130
    assert json.loads((parts / "run.json").read_text())["status"] == "running"
    again = run(*program[2:], cwd=base, pipeline="detect")
    assert again.returncode == 0, again.stdout + again.stderr
    assert same(Finished(parts, finished.server, finished.arguments, again.stdout).weights, finished.weights)
