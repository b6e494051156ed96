"""Classes that are written as text: numbers are the classes' indices, anything else is a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")


def number_classes(
    texts: Iterable[str], class_names: tuple[str, ...] | None = None
) -> tuple[Mapping[str, int], tuple[str, ...] | None]:
    """Give every text a class index.

    If all texts are whole numbers these are the indices, below 0 for none; otherwise the sorted texts are the classes'
    names. If names are known beforehand, a text is one of them or a number; another one is not among the result.

    Args:    texts: as they are written; an empty one is no class, and not among the result.
    Returns: the index of each text, and the names of the classes if they have some.
    """
    known = {text.strip() for text in texts} - {""}
    numbers = {text: max(-1, int(text.partition(".")[0])) for text in known if _WHOLE_NUMBER.fullmatch(text)}
    if class_names is not None:
        return {**numbers, **{name: index for index, name in enumerate(class_names) if name in known}}, class_names
    if len(numbers) == len(known):
        return numbers, None
    names = tuple(sorted(known))
    return {name: index for index, name in enumerate(names)}, names
