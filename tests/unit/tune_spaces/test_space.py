"""A search space: its trials, and what is refused before anything starts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES
from tune_spaces import SPACES
from tune_spaces.space import Asha, Choice, Space, Uniform

CONFIG = FINETUNE_RECIPES["demo_finetune"]()


def space(**changes: object) -> Space:
    return replace(SPACES["demo"], **changes)


def test_a_grid_is_every_combination_once():
    points = space(vary={"optim.layer_decay": Choice((0.7, 0.8)), "optim.base_lr": Choice((1.0, 2.0, 3.0))}).points(0)
    assert [tuple(point.values()) for point in points] == [
        *((0.7, 1.0), (0.7, 2.0), (0.7, 3.0)),
        *((0.8, 1.0), (0.8, 2.0), (0.8, 3.0)),
    ]


def test_a_grid_leaves_out_what_makes_no_sense():
    points = {tuple(point.values()) for point in SPACES["ablate_fill"].points(0)}
    alone = {(fill, "none") for fill in ("zero", "learnable", "shuffle", "zoom")}
    assert points == {("mix", "attention"), ("mix", "none")} | alone
    assert SPACES["ablate_fill"].num_trials == 6


def test_draws_depend_on_the_seed_alone_and_stay_in_range():
    wide = SPACES["wide"]
    assert wide.points(3) == wide.points(3) != wide.points(4)
    rates = [point["optim.base_lr"] for point in replace(wide, trials=2000).points(0)]
    assert min(rates) >= 1e-4
    assert max(rates) <= 2e-3
    middle = math.sqrt(1e-4 * 2e-3)  # of the logarithms
    assert sum(rate < middle for rate in rates) / 2000 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.layer_dekay": Choice((0.7,))}, r"no field optim.layer_dekay: did you mean optim.layer_decay"),
        ({"optim": Choice((0.7,))}, "optim is 0.7: it must be"),
        ({"optim.layer_decay": Choice(("0.7",))}, "optim.layer_decay is '0.7': it must be a number or None"),
        ({"loop.batch_size": Choice((32.0,))}, "loop.batch_size is 32.0: it must be a whole number"),
        ({"loop.precision": Choice(("float16",))}, "must be 'float32' or 'bfloat16'"),
        ({"loop.compile": Choice((1,))}, "must be True or False"),
        ({"encoder.drop_path": Choice((0.1, 1.0))}, "encoder.drop_path cannot be 1.0: drop_path is a probability"),
        ({"encoder.drop_path": Choice((-0.1,))}, "encoder.drop_path cannot be -0.1"),
    ],
)
def test_what_the_config_does_not_take(changes, message):
    with pytest.raises(ValueError, match=message):
        space(vary=changes).check(CONFIG)


def test_the_fields_of_a_reference_are_checked():
    with pytest.raises(ValueError, match=r"no field optim.base_rate"):
        space(reference={"optim.base_rate": 0.1}).check(CONFIG)
    replace(SPACES["demo_pretrain"], reference={"head": 1}).check(PRETRAIN_RECIPES["demo"]())  # which it does not have


def test_both_ends_of_a_range_are_checked():
    with pytest.raises(ValueError, match=r"drop_path cannot be 1\.0"):
        space(vary={"encoder.drop_path": Uniform(0.0, 1.0)}, search="random", trials=1).check(CONFIG)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: space(vary={}), "no trial"),
        (lambda: space(vary={"optim.layer_decay": Choice(())}), "no trial"),
        (lambda: space(search="random"), "no trial: say how many"),
        (lambda: space(search="random", trials=0), "no trial: say how many"),
        (lambda: space(trials=3), "a grid has its own 6 trials"),
        (lambda: space(vary={"optim.layer_decay": Uniform(0.6, 0.9)}), "a grid cannot hold the range"),
        (lambda: space(without=tuple({"optim.layer_decay": decay} for decay in (0.7, 0.75, 0.8))), "all .* left out"),
        (lambda: replace(SPACES["wide"], without=({"mixup.mixup": 0.0},)), "only a grid"),
        (lambda: space(hours=0.0), "the budget is 0.0 hours"),
        (lambda: space(vary={"encoder.embed_dim": Choice((16, 32))}), "changes the shapes"),
        (lambda: space(vary={"augment.image_size": Choice((64, 96))}), "changes the shapes"),
        (lambda: Choice((0.1, 0.1)), "give each of them once"),
        (lambda: Uniform(0.2, 0.1), "low must be below high"),
        (lambda: Uniform(0.0, 0.1, log=True), "above 0 on a log scale"),
        (lambda: Asha(reduction=1.0), "reduction above 1"),
    ],
)
def test_what_is_no_space(make, message):
    with pytest.raises(ValueError, match=message):
        make()
