"""The fields of a config by their dotted names, as on the command line: optim.layer_decay."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

Value = float | int | str | bool | None
"""What a field that varies can hold."""
ConfigT = TypeVar("ConfigT")


def get_field(config: Any, name: str) -> Any:
    """The value of a dotted field.   Raises: ValueError, with the nearest names, if there is none of this name."""
    value = config
    for part in name.split("."):
        if not is_dataclass(value) or part not in {item.name for item in fields(value)}:
            near = difflib.get_close_matches(name, field_names(config), n=3, cutoff=0.4)
            remedy = f"did you mean {', '.join(near)}?" if near else "--help of its pipeline lists them."
            raise ValueError(f"{type(config).__name__} has no field {name}: {remedy}")
        value = getattr(value, part)
    return value


def field_names(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config and of its parts."""
    names = []
    for item in fields(config):
        value = getattr(config, item.name)
        names += field_names(value, f"{prefix}{item.name}.") if is_dataclass(value) else [f"{prefix}{item.name}"]
    return names


def set_fields(config: ConfigT, values: Mapping[str, Value]) -> ConfigT:
    """A copy of a config with other values in dotted fields.

    Args: config: a dataclass that may hold others.  values: by dotted name.
    Raises: ValueError for a field that does not exist, a value of another type, or one that the config refuses.
    """
    for name in values:
        get_field(config, name)
    return _set(config, values, "")


def _set(config: Any, values: Mapping[str, Value], prefix: str) -> Any:
    """Set all fields at once, because a value may be allowed only together with another."""
    hints = typing.get_type_hints(type(config))
    own = {name: value for name, value in values.items() if "." not in name}
    for name, value in own.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{prefix}{name} is {value!r}: it must be {_words(hints[name])}.")
    parts: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        if name not in own:
            first, _, rest = name.partition(".")
            parts.setdefault(first, {})[rest] = value
    inner = {first: _set(getattr(config, first), part, f"{prefix}{first}.") for first, part in parts.items()}
    try:
        return replace(config, **own, **inner)
    except ValueError as error:
        if not own:
            raise
        words = " and ".join(f"{prefix}{name} cannot be {value!r}" for name, value in own.items())
        raise ValueError(f"{words}: {error}") from error


def _fits(value: Value, wanted: Any) -> bool:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return value in typing.get_args(wanted)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(wanted, type) and isinstance(value, wanted)


def _words(wanted: Any) -> str:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return " or ".join(map(repr, typing.get_args(wanted)))
    return {float: "a number", int: "a whole number", str: "text", bool: "True or False", type(None): "None"}.get(
        wanted, f"a {wanted} (which a sweep cannot vary)"
    )
