"""A sweep of four trials, each of them seconds."""

from __future__ import annotations

import sys

PROGRAM = """
import sys
from dataclasses import replace
from tune_spaces import SPACES
from tune_spaces.space import Choice
from pipelines.sweep import main

vary = {"optim.layer_decay": Choice((0.7, 0.8)), "encoder.drop_path": Choice((0.0, 0.1))}
SPACES["tiny"] = replace(SPACES["demo"], vary=vary, change={})
sys.exit(main(["tiny", *sys.argv[1:]]))
"""
"""What pipelines/sweep.py runs, with a space of 2 x 2 beside the others."""
SHORT = [
    *("--augment.image-size", "64", "--loop.batch-size", "8", "--loop.steps", "32", "--loop.log-every-steps", "4"),
    *("--loop.max-broken-fraction", "0.2", "--optim.base-lr", "0.02"),
]


def sweep_command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]
