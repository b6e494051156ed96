"""The loop without Ray: bitwise resume, accumulation, logging, and what stops a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mixmae.step import StepOutput
from mixmae.training import loop
from mixmae.training.checkpoint import load_checkpoint, save_checkpoint
from mixmae.training.ema import WeightAverage
from mixmae.training.failures import TrainingStopped
from mixmae.training.loop import Diverged, LoopConfig, Silent, TrainState, step_seed, train
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.schedule import run_length

CONFIG = LoopConfig(epochs=2, warmup_epochs=0.5, batch_size=8, log_every_steps=3, seed=5)
NUM_IMAGES = 40


@dataclass
class Seen(Silent):
    """Events that keep what they are told."""

    logs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)

    def log(self, step: int, record: Mapping[str, float], broken: Sequence) -> None:
        self.logs.append((step, dict(record)))
        self.broken += [item.row for item in broken]

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.evaluations.append(step)
        return {"heldout/loss": 1.0}

    def save(self, state: TrainState) -> None:
        self.saves.append(state.step)


class Net(nn.Module):
    """Uses the step's generator, the global generator (dropout) and the data: all that a resume must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 4))

    def forward(self, images: Tensor, generator: torch.Generator) -> StepOutput:
        target = torch.randn(4, generator=generator)
        loss = (self.net(images) - target).square().mean()
        return StepOutput(loss=loss, metrics={"scale": images.mean()})


def _images(step: int, first: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(step_seed(1, "image", step))
    return torch.randint(0, 256, (8, 3, 4, 4), generator=generator, dtype=torch.uint8)[first : first + count]


def _batches(start_step: int, micro: int, broken_every: int = 0) -> Iterator:
    step = start_step
    while True:
        for first in range(0, 8, micro):
            rows = [SimpleNamespace(row=step, where=f"shard#{step}", reason="truncated")]
            yield SimpleNamespace(
                images=_images(step, first, micro),
                broken=rows if broken_every and step % broken_every == 0 and first == 0 else [],
            )
        step += 1


def _step(model: nn.Module, batch, generator: torch.Generator, first_sample: int) -> StepOutput:
    return model(batch.images.float() / 255, generator)


def _run(
    config=CONFIG,
    *,
    state=None,
    model=None,
    optimizer=None,
    stop=None,
    dropout=True,
    broken_every=0,
    average=None,
    events=None,
    batches=None,
):
    torch.manual_seed(0)
    model = model or Net()
    if not dropout:
        model.net[2].p = 0.0
    optimizer = optimizer or build_optimizer(model, OptimConfig(base_lr=0.3))
    state = state or TrainState()
    length = run_length(
        num_images=NUM_IMAGES, batch_size=config.batch_size, epochs=config.epochs, warmup_epochs=config.warmup_epochs
    )
    events = events or Seen()
    train(
        model=model,
        optimizer=optimizer,
        average=average,
        peak_lr=0.01,
        clip_grad_norm=None,
        step_function=_step,
        batches=batches or _batches(state.step, config.micro_batch_size or config.batch_size, broken_every),
        state=state,
        config=config,
        length=length if stop is None else replace(length, total_steps=stop),
        events=events,
        device=torch.device("cpu"),
    )
    return model, optimizer, state, events


def test_resume_is_bitwise(tmp_path):
    whole, _, whole_state, _ = _run()
    assert whole_state.step == 10
    length = run_length(num_images=NUM_IMAGES, batch_size=8, epochs=2, warmup_epochs=0.5)
    for interrupted_at in (1, 5, 9):
        # The interrupted run has the whole run's schedule and stops because its process ends: take it from a save.
        torch.manual_seed(0)
        model = Net()
        optimizer = build_optimizer(model, OptimConfig(base_lr=0.3))

        class Stop(Exception):
            pass

        class SaveAndDie(Seen):
            def log(self, step, record, broken, at=interrupted_at, model=model, optimizer=optimizer):
                if step == at:
                    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={"step": step})
                    raise Stop

        with pytest.raises(Stop):
            train(
                model=model,
                optimizer=optimizer,
                peak_lr=0.01,
                clip_grad_norm=None,
                step_function=_step,
                batches=_batches(0, 8),
                state=TrainState(),
                config=replace(CONFIG, log_every_steps=1),
                length=length,
                events=SaveAndDie(),
                device=torch.device("cpu"),
            )
        torch.manual_seed(99)
        model = Net()
        optimizer = build_optimizer(model, OptimConfig(base_lr=0.3))
        saved = load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
        _run(state=TrainState(step=saved["step"]), model=model, optimizer=optimizer)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (interrupted_at, name)


def test_seed_changes_the_run():
    first, *_ = _run()
    second, *_ = _run(replace(CONFIG, seed=6))
    assert not torch.equal(first.net[1].weight, second.net[1].weight)


def test_accumulation_does_not_change_the_result():
    whole, _, _, events = _run(dropout=False)
    parts, _, _, part_events = _run(replace(CONFIG, micro_batch_size=2), dropout=False)
    torch.testing.assert_close(whole.net[1].weight, parts.net[1].weight, rtol=1e-5, atol=1e-7)
    for (step, record), (part_step, part_record) in zip(events.logs, part_events.logs, strict=True):
        assert step == part_step
        assert record["loss"] == pytest.approx(part_record["loss"], rel=1e-5)
        assert record["scale"] == pytest.approx(part_record["scale"], rel=1e-5)


def test_events_and_records():
    *_, state, events = _run()
    assert [step for step, _ in events.logs] == [1, 3, 6, 9, 10]
    assert events.evaluations == events.saves == [3, 6, 9, 10]  # an epoch is 5 steps, but at least four a run
    record = events.logs[-1][1]
    assert record["epoch"] == 2.0
    assert record["lr"] == pytest.approx(0.000432272712)  # 0.01 (1 + cos(6.5 pi / 7.5)) / 2
    assert 0 <= record["data_wait_share"] <= 1
    assert record["images_per_s"] > 0
    assert state.metrics["heldout/loss"] == 1.0
    assert state.images_seen == 80


class BadSteps(Net):
    """Some steps' losses, or the gradients alone behind a loss that is fine, are no numbers."""

    def __init__(self, bad: set[int], *, gradient_alone: bool = False) -> None:
        super().__init__()
        self.bad, self.gradient_alone, self.calls = bad, gradient_alone, 0

    def forward(self, images, generator):
        output = super().forward(images, generator)
        self.calls += 1
        if self.calls not in self.bad:
            return output
        if self.gradient_alone:
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
            return output
        return StepOutput(loss=output.loss * float("nan"), metrics=output.metrics)


@pytest.mark.parametrize("gradient_alone", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(gradient_alone, optimizer):
    saved: dict[int, dict[str, Tensor]] = {}

    class Saves(Seen):
        def save(self, state: TrainState) -> None:
            saved[state.step] = {name: value.clone() for name, value in model.state_dict().items()}

    torch.manual_seed(0)
    model = BadSteps({4, 7}, gradient_alone=gradient_alone)
    built = build_optimizer(model, OptimConfig(base_lr=0.3, optimizer=optimizer))
    config = replace(CONFIG, checkpoint_every_epochs=0.2)
    _, _, state, seen = _run(config, model=model, optimizer=built, events=Saves())
    assert state.skipped_steps == 2
    assert [record["skipped_steps"] for _, record in seen.logs] == [0, 0, 1, 2, 2]
    assert all(torch.isfinite(value).all() for weights in saved.values() for value in weights.values())
    for step in range(2, 11):
        is_same = all(torch.equal(saved[step][name], saved[step - 1][name]) for name in saved[step])
        assert is_same == (step in (4, 7)), step
    assert all(record["loss"] == record["loss"] for _, record in seen.logs)


def test_many_bad_steps_in_a_row_end_the_loop_with_the_weights_before_the_first():
    model = BadSteps({5, 6, 7, 8, 9, 10})
    kept = {}

    class Logs(Seen):
        def log(self, step, record, broken):
            if step == 4:
                kept.update({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.raises(Diverged, match="not finite in the steps 5 to 7") as caught:
        _run(replace(CONFIG, max_bad_steps=3, log_every_steps=1), model=model, events=Logs())
    assert (caught.value.first_step, caught.value.step) == (4, 7)
    assert torch.equal(caught.value.batch.images, _images(6, 0, 8))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_what_was_counted_since_the_last_log_survives_a_stop():
    """A run that is asked to stop between two log steps, and continued, logs what an uninterrupted one does."""
    timings = ("images_per_s", "data_wait_share", "step_s")

    def plain(logs):
        return [(step, {key: v for key, v in record.items() if key not in timings}) for step, record in logs]

    config = replace(CONFIG, log_every_steps=4, max_broken_fraction=1.0)
    whole_model, _, whole_state, whole = _run(config, broken_every=3)
    states = []

    class Stops(Seen):
        def asked(self, step):
            return "stop" if step == 6 else ""

        def save(self, state):
            states.append(json.loads(json.dumps(vars(state))))

    torch.manual_seed(0)
    model = Net()
    optimizer = build_optimizer(model, OptimConfig(base_lr=0.3))
    _, _, state, first = _run(config, model=model, optimizer=optimizer, broken_every=3, events=Stops())
    assert state.step == 6
    _, _, state, second = _run(config, model=model, optimizer=optimizer, broken_every=3, state=TrainState(**states[-1]))
    assert plain(first.logs) + plain(second.logs) == plain(whole.logs)
    assert first.broken + second.broken == whole.broken
    assert state.broken_images == whole_state.broken_images
    assert all(torch.equal(value, whole_model.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_is_made_when_it_is_asked_for_and_after_minutes():
    class Asks(Seen):
        def asked(self, step):
            return "save" if step == 2 else ""

    config = replace(CONFIG, checkpoint_every_epochs=100, log_every_steps=4)
    assert _run(config, events=Asks())[3].saves == [2, 3, 6, 9, 10]
    assert _run(replace(config, checkpoint_every_minutes=1e-9))[3].saves == [1, 3, 4, 6, 8, 9, 10]


def test_the_average_follows_every_step():
    """The loop's average against one that is updated by hand after each optimiser step."""
    model = Net()
    optimizer = build_optimizer(model, OptimConfig(base_lr=0.3))
    by_hand = WeightAverage(model, 0.9)
    optimizer.register_step_post_hook(lambda *_: by_hand.update(model))
    average = WeightAverage(model, 0.9)
    _run(model=model, optimizer=optimizer, average=average)
    assert average.state_dict()["updates"] == 10
    for name, value in by_hand.state_dict()["averages"].items():
        assert torch.equal(value, average.state_dict()["averages"][name]), name


def test_broken_images_are_reported_and_too_many_stop_the_run():
    *_, state, events = _run(replace(CONFIG, max_broken_fraction=0.2), broken_every=5)
    assert events.broken == [0, 5]
    assert state.broken_images == 2
    with pytest.raises(TrainingStopped, match=r"2 of 48 images could not be used \(4\.2%.*max-broken-fraction"):
        _run(broken_every=5)


def _partly_broken(share: float) -> Iterator:
    """Batches of 8 images of which this share is broken."""
    for step in range(1000):
        rows = [SimpleNamespace(row=8 * step + i, where=f"shard#{i}", reason="no image") for i in range(8)]
        yield SimpleNamespace(images=_images(step, 0, 8), broken=rows[: round(8 * share)])


@pytest.mark.parametrize(
    ("share", "allowed", "total", "stopped_at"),
    [
        (1.0, 0.01, 1000, 8),  # after 64 images, long before the log
        (1.0, 1.0, 1000, 8),  # whatever is allowed
        (0.75, 0.01, 1000, 8),
        (0.75, 0.8, 20, None),
        (0.5, 0.01, 2, None),  # a run of 16 images says little
        (1.0, 0.01, 2, 2),  # but this much
    ],
)
def test_a_run_on_hardly_anything_but_broken_images_stops_soon(share, allowed, total, stopped_at):
    config, state, events = replace(CONFIG, log_every_steps=50, max_broken_fraction=allowed), TrainState(), Seen()
    if stopped_at is None:
        _run(config, state=state, stop=total, batches=_partly_broken(share))
        assert state.step == total
        return
    message = rf"{8 * stopped_at * share:.0f} of the first {8 * stopped_at} images .* for example shard#0: no image;"
    with pytest.raises(TrainingStopped, match=message):
        _run(config, state=state, stop=total, batches=_partly_broken(share), events=events)
    assert len(events.broken) == 8 * stopped_at * share  # the ledger has all of them


def test_a_continued_run_stops_soon_too():
    state = TrainState(step=500, images_seen=4000)
    with pytest.raises(TrainingStopped, match="64 of the first 64 images"):
        _run(replace(CONFIG, log_every_steps=50), state=state, stop=1000, batches=_partly_broken(1.0))
    # The last step of one may well be of broken images.
    last = TrainState(step=999, images_seen=7992)
    _run(replace(CONFIG, log_every_steps=50), state=last, stop=1000, batches=_partly_broken(1.0))
    assert last.step == 1000


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        *(("epochs", 0), ("warmup_epochs", 601), ("steps", 0), ("batch_size", 0), ("max_broken_fraction", 1.5)),
        ("micro_batch_size", 0),
    ],
)
def test_impossible_settings_are_refused(field_name, value):
    with pytest.raises(ValueError, match=field_name):
        LoopConfig(**{field_name: value})


def test_a_loss_above_the_limit_stops_the_run():
    *_, events = _run()
    losses = [record["loss"] for _, record in events.logs]
    _run(replace(CONFIG, max_loss=max(losses) + 0.01))
    with pytest.raises(TrainingStopped, match=rf"The loss is {losses[0]} at step 1: the run has diverged"):
        _run(replace(CONFIG, max_loss=losses[0] - 0.01))


def test_what_drops_out_depends_on_the_index_in_the_batch_alone():
    """Micro-batches draw one by one, so that two workers of one draw what one worker of two does."""
    drawn: list[tuple[int, float]] = []

    def step(model: nn.Module, batch, generator: torch.Generator, first_sample: int) -> StepOutput:
        drawn.append((first_sample, torch.rand(()).item()))
        return _step(model, batch, generator, first_sample)

    for micro in (2, 4):
        model = Net()
        train(
            model=model,
            optimizer=build_optimizer(model, OptimConfig(base_lr=0.3)),
            peak_lr=0.01,
            clip_grad_norm=None,
            step_function=step,
            batches=_batches(0, micro),
            state=TrainState(),
            config=replace(CONFIG, micro_batch_size=micro),
            length=replace(run_length(num_images=40, batch_size=8, epochs=2, warmup_epochs=0.5), total_steps=2),
            events=Seen(),
            device=torch.device("cpu"),
        )
    first, second = drawn[:8], drawn[8:]
    assert [index for index, _ in first] == [0, 2, 4, 6] * 2
    assert len({value for _, value in first}) == 8
    assert [first[0], first[2], first[4], first[6]] == second


def test_without_clipping_no_gradient_is_touched():
    """A norm of infinity would otherwise make every gradient NaN, not only the one that has overflowed."""
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    assert loop._clip(model, None).item() == pytest.approx((6 * 9 + 2 * 16) ** 0.5)
    model.bias.grad[0] = float("inf")
    assert not loop._clip(model, None).isfinite()
    assert model.weight.grad.eq(3.0).all()
    model.bias.grad[0] = 4.0
    assert loop._clip(model, 1.0).item() == pytest.approx((6 * 9 + 2 * 16) ** 0.5)  # before clipping
    assert loop._clip(model, None).item() == pytest.approx(1.0, abs=1e-5)
