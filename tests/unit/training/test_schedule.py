"""Run length and learning rates, worked by hand and against the official schedule."""

import json
from pathlib import Path

import pytest

from mixmae.training.schedule import RunLength, learning_rate, run_length

GOLDEN = Path(__file__).parents[2] / "golden" / "mixmim_optimization.json"


def test_length_by_hand():
    length = run_length(num_images=1000, batch_size=64, epochs=10, warmup_epochs=2)
    assert length.steps_per_epoch == 15.625
    assert length.total_steps == 156  # 10 000 images are 156 batches of 64 and 16 images left over
    assert length.warmup_steps == pytest.approx(31.2)


def test_steps_override_epochs_and_keep_the_warmup_share():
    length = run_length(num_images=1000, batch_size=64, epochs=10, warmup_epochs=2, steps=50)
    assert (length.total_steps, length.warmup_steps) == (50, 10)


def test_learning_rate_at_start_warmup_end_middle_and_end():
    length = RunLength(total_steps=110, warmup_steps=10, steps_per_epoch=11)
    assert learning_rate(0, peak=1.0, length=length) == 0.0
    assert learning_rate(5, peak=1.0, length=length) == 0.5
    assert learning_rate(10, peak=1.0, length=length) == 1.0
    assert learning_rate(60, peak=1.0, length=length) == pytest.approx(0.5)
    assert learning_rate(109, peak=1.0, length=length) == pytest.approx(0.000246719817)  # (1 + cos(0.99 pi)) / 2
    assert learning_rate(60, peak=1.0, final=0.5, length=length) == pytest.approx(0.75)


def test_official_learning_rates():
    golden = json.loads(GOLDEN.read_text())["lr_schedule"]
    per_epoch = 1000
    length = RunLength(
        total_steps=golden["epochs"] * per_epoch,
        warmup_steps=golden["warmup_epochs"] * per_epoch,
        steps_per_epoch=per_epoch,
    )
    for epoch, expected in golden["lr_at_epoch"].items():
        rate = learning_rate(round(float(epoch) * per_epoch), peak=golden["lr"], length=length, final=golden["min_lr"])
        assert rate == pytest.approx(expected, rel=1e-6), epoch


def test_events_happen_at_least_four_times():
    length = RunLength(total_steps=100, warmup_steps=0, steps_per_epoch=1000)
    assert length.every(1) == 25
    assert RunLength(total_steps=100, warmup_steps=0, steps_per_epoch=10).every(1) == 10


def test_too_few_images_and_empty_runs_are_refused():
    with pytest.raises(ValueError, match="63 images but a batch needs 64"):
        run_length(num_images=63, batch_size=64, epochs=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="no step"):
        run_length(num_images=64, batch_size=64, epochs=0.5, warmup_epochs=0)


def test_poly_and_step_at_the_places_that_matter():
    length = RunLength(total_steps=1000, warmup_steps=10, steps_per_epoch=11)
    poly = [learning_rate(step, peak=2.0, length=length, schedule="poly") for step in (0, 5, 10, 500, 999)]
    assert poly == pytest.approx([0.0, 2 * 0.5 * 0.995, 2 * 0.99, 1.0, 0.002])
    steps = [learning_rate(step, peak=1.0, length=length, schedule="step") for step in (5, 10, 888, 889, 962, 963)]
    assert steps == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.01])
    without = RunLength(total_steps=1000, warmup_steps=0, steps_per_epoch=11)
    assert learning_rate(0, peak=1.0, length=without, schedule="poly") == 1.0
