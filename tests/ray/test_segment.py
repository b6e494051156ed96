"""Segmentation end to end on some of the built-in scenes: a real Ray cluster and MLflow server, as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.factories import same
from tests.ray.conftest import Finished, command, has_checkpoint, interrupt, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHORT = [
    *("--augment.image-size", "64", "--augment.shorter-px", "64", "--augment.longer-px", "64", "--slide-stride", "64"),
    *("--encoder.embed-dim", "16", "--encoder.num-heads", "1", "2", "4", "--encoder.drop-path", "0.2"),
    *("--head.channels", "16", "--head.aux-channels", "8", "--ema-decay", "0.9"),
    *("--loop.batch-size", "8", "--loop.micro-batch-size", "4", "--loop.steps", "24", "--loop.log-every-steps", "4"),
]
"""The demo recipe, cut down to seconds. Micro-batches of one size make one worker's run the same as two workers'."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mlflow_server, few_scenes) -> Finished:
    base = tmp_path_factory.mktemp("runs")
    arguments = ["--mlflow-uri", mlflow_server, "--data", str(few_scenes), *SHORT]
    (base / "whole").mkdir()
    (base / "whole" / "plan.json").write_text('{"images_per_s": 40}')
    done = run("demo_segment", "--output", base / "whole", *arguments, "--workers", "1", cwd=base, pipeline="segment")
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(base / "whole", mlflow_server, arguments, done.stdout)


def test_the_run_says_and_keeps_what_it_did(finished):
    assert "7 classes of pixels, validation on 40 images" in finished.text
    assert "Finished in" in finished.text
    assert "planned 40 images/s, ran at" in finished.text
    assert finished.state["metrics"]["plan/reached"] > 0
    state = finished.state
    assert state["classes"][0] == "ground"
    assert 0 < state["metrics"]["final/miou"] < 1
    assert state["metrics"]["best/miou"] >= state["metrics"]["final/miou"] - 1e-9
    assert [step for step, _ in finished.curve("val/miou")] == [6, 12, 18, 24]
    assert finished.curve("iou/ground")
    assert finished.curve("val_ema/miou")
    assert len(list((finished.output / "panels").glob("*.png"))) == 4
    assert len((finished.output / "classes.csv").read_text().splitlines()) == 8
    assert {"classes.csv", "worst.png"} <= finished.artifacts


@pytest.mark.slow
def test_two_workers_and_an_interruption_end_with_the_same_weights(finished):
    base = finished.output.parent
    both = base / "both"
    done = run("demo_segment", "--output", both, *finished.arguments, "--workers", "2", cwd=base, pipeline="segment")
    assert done.returncode == 0, done.stdout + done.stderr
    two = Finished(both, finished.server, finished.arguments, done.stdout)
    curves = [[dict(one.curve(name)) for one in (finished, two)] for name in ("train/loss", "val/loss", "val/miou")]
    for whole, shared in curves:  # up to the order of additions
        assert shared == pytest.approx(whole, rel=2e-3, abs=2e-3)

    parts = base / "parts"
    program = command("demo_segment", "--output", parts, *finished.arguments, "--workers", "1", pipeline="segment")
    status, _ = interrupt(program, lambda: has_checkpoint(parts), cwd=base)
    assert status == 130
    assert json.loads((parts / "run.json").read_text())["status"] == "running"
    again = run(*program[2:], cwd=base, pipeline="segment")
    assert again.returncode == 0, again.stdout + again.stderr
    assert same(Finished(parts, finished.server, finished.arguments, again.stdout).weights, finished.weights)
