"""Renaming by rules, for formats that differ from ours only in names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from mixmae.convert.architecture import StateDict

Rules = Iterable[tuple[str, str]]
"""Pairs of pattern and replacement, as in re.sub; the first pattern that the start of a name matches is applied."""


def rename(state: Mapping[str, Tensor], rules: Rules) -> StateDict:
    """Rename weights by rules; names that match no rule are kept."""
    return {_renamed(name, rules): value for name, value in state.items()}


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        if re.match(pattern, name):
            return re.sub(f"^(?:{pattern})", new, name)
    return name
