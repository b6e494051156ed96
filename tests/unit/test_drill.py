"""The drill's judgement: it must see what was lost, what was seen twice, and weights that differ in one bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.drilling.ground import STEPS, Ground, Outcome
from mixmae.training.checkpoint import save_checkpoint


def ran(ground: Ground, name: str, *, seen: list[tuple[int, int, int, list[int]]], last_bit: bool = False) -> Path:
    """A finished run.   Args: seen: (step, rank, number of workers, rows).  last_bit: of one weight is another."""
    output = ground.folder / name
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    if last_bit:
        weight = model.weight.detach().numpy()
        weight[0, 0] = np.nextafter(weight[0, 0], np.float32(np.inf))
    state = {"position": {"step": STEPS}}
    save_checkpoint(ground.last_checkpoint(output), model=model, optimizer=optimizer, state=state)
    lines = [json.dumps({"step": step, "rank": rank, "of": of, "rows": rows}) for step, rank, of, rows in seen]
    (ground.notes(output) / "seen.jsonl").write_text("\n".join(lines))
    return output


PLAIN = [(0, 0, 1, [5, 6]), (1, 0, 1, [7, 8])]


def test_a_step_that_is_done_again_counts_once(tmp_path):
    ground = Ground(tmp_path)
    reference = ran(ground, "reference", seen=PLAIN)
    both = [(0, 0, 1, [5, 6]), (1, 0, 2, [7]), (1, 1, 2, [8]), (1, 0, 1, [7, 8])]
    outcome = ground.compare(Outcome("a"), ran(ground, "again", seen=both), reference)
    assert (outcome.lost, outcome.twice, outcome.weights) == (0, 0, "identical")
    two = [(0, 0, 1, [5, 6]), (1, 0, 1, [7, 8]), (1, 1, 2, [8]), (1, 0, 2, [7])]
    outcome = ground.compare(Outcome("a"), ran(ground, "more workers", seen=two), reference, exact=False)
    assert (outcome.lost, outcome.twice, outcome.weights) == (0, 0, "within 0e+00")


@pytest.mark.parametrize(
    ("seen", "lost", "twice"),
    [
        ([(0, 0, 1, [5, 6])], 2, 0),
        ([(0, 0, 1, [5, 6]), (1, 0, 1, [7, 7])], 1, 1),
        ([*PLAIN, (2, 0, 1, [5, 6])], 0, 2),
        ([(0, 0, 1, [5, 6]), (1, 0, 2, [7])], 1, 0),
    ],
)
def test_images_that_are_lost_or_seen_twice(tmp_path, seen, lost, twice):
    ground, outcome = Ground(tmp_path), Outcome("a")
    reference = ran(ground, "reference", seen=PLAIN)
    with pytest.raises(AssertionError):
        ground.compare(outcome, ran(ground, "other", seen=seen), reference)
    assert (outcome.lost, outcome.twice) == (lost, twice)


def test_weights_that_differ_in_one_bit(tmp_path):
    ground, outcome = Ground(tmp_path), Outcome("a")
    reference, other = ran(ground, "reference", seen=PLAIN), ran(ground, "other", seen=PLAIN, last_bit=True)
    with pytest.raises(AssertionError, match="OTHERS"):
        ground.compare(outcome, other, reference)
    assert ground.compare(outcome, other, reference, exact=False).weights.startswith("within ")
