"""Ten steps of each task compute what they did when curves.json was made; curves.py says how and when to renew it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.curves import CHANGES, RUNS, distance, read, record, write_shards

REMEDY = "a refactoring must not do this; a change of mathematics renews curves.json: python -m tests.golden.curves"

CAUGHT = [("mae", change) for change in CHANGES]
CAUGHT += [("finetuning", change) for change in ("crop", "weight decay", "learning rate")]
"""All changes on the quickest run, and on finetuning those that differ there; --margins has all on all runs."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_the_file_is_of_these_runs():
    assert {name: run["settings"] for name, run in read().items()} == RUNS, REMEDY


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_as_it_was(name, shards):
    expected, found = read()[name]["curve"], record(RUNS[name], shards)
    assert distance(name, expected, found) <= 1, f"{name}: {expected} became {found}: {REMEDY}"


@pytest.mark.parametrize(("name", "change"), CAUGHT)
def test_a_changed_run_is_caught(name, change, shards):
    found = record({**RUNS[name], **CHANGES[change]}, shards)
    assert distance(name, read()[name]["curve"], found) > 10
