"""Names by rules: the tables of formats that differ from ours in names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from mixmae.convert.architecture import StateDict

Rules = Iterable[tuple[str, str]]
"""Pairs of a pattern and what it becomes, as in re.sub; the first that a name starts with is applied."""


def rename(state: Mapping[str, Tensor], rules: Rules) -> StateDict:
    """Rename weights by rules; a name that no rule knows stays as it is."""
    return {_renamed(name, rules): value for name, value in state.items()}


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        if re.match(pattern, name):
            return re.sub(f"^(?:{pattern})", new, name)
    return name
