"""Which of a file's tensors are the weights: prefixes are stripped and one set is chosen, whatever the file's format.

A file may hold several sets: a model and the running average of its weights (EMA), a student and its teacher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmae.convert.architecture import StateDict
from mixmae.convert.formats import is_known, unknown_format

WRAPPING_MODULES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that DDP, torch.compile, FSDP and checkpointing of activations add."""

NO_WEIGHTS = re.compile(r"(opt|amp|scaler)$|.*(optim|sched)")
"""First or second keys of the state of an optimizer and the like, whose tensors may have the names of weights."""

ROLES = {
    "": "the trained weights",
    r"teacher|momentum|target|encoder_k": "a teacher's",
    r"ema|swa|averaged?": "a running average",
    r"student": "a student's",
}
"""What a set is, by a word of one of its keys; without a --weights-key the first kind that is there is read. A teacher
comes before its student, because it is what DINO and iBOT evaluate."""

_OTHER_ROLES = [re.compile(rf"(?:^|_)(?:{words})(?:_|$)") for words in ROLES if words]


def choose_weights(content: Any, path: Path | str, key: str | None = None) -> StateDict:
    """Choose one set of weights in the content of a file, and print which if there was a choice.

    Args:
        content: mappings of tensors by name, nested or not.  path: for messages.
        key: of the set, as in "model_ema" or "student.backbone"; None: the first kind of ROLES.
    Returns: tensors by names of a known format, without the prefixes before them.
    Raises: ValueError if there are no weights, none of a known format, or none under the key.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights by name, but a {type(content).__name__}: save a state dict")
    named = ((WRAPPING_MODULES.sub("", name), value) for name, value in _tensors(content))
    tensors = {name: value for name, value in named if not any(map(NO_WEIGHTS.match, name.split(".")[:2]))}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:10]))
        raise ValueError(
            f"{path} holds no weights; {f'its keys are {keys}' if keys else 'it is empty'}: give another file"
        )
    sets = dict(sorted(_find_sets(tensors), key=lambda item: _role(item[0])))
    if not sets:
        raise ValueError(f"{path}: {unknown_format(tensors)}")
    names = ", ".join(name or "its top" for name in sets)
    chosen = [name for name in sets if key is None or f".{key}." in f".{name}."]
    if not chosen:
        raise ValueError(f"{path} has no weights under {key}, but under {names}: change --weights-key, or leave it out")
    name = chosen[0]
    said = []
    if len(sets) > 1:
        said.append(f"{len(sets)} sets of weights (under {names}); --weights-key chooses another one")
    used = [f"{prefix}.{inner}".lstrip(".") for prefix, state in sets.items() for inner in state]
    left = [other for other in tensors.keys() - used if tensors[other].ndim]
    if left:
        said.append(f"{len(left)} other tensors, such as {min(left)}, which are left out")
    if said or _role(name):
        what = list(ROLES.values())[_role(name)]
        beside = f"; the file has {' and '.join(said)}" if said else ""
        print(f"note: {path}: reading {what}, under {name or 'its top'}{beside}")
    return sets[name]


def _tensors(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested mappings, by the keys that lead to them, with dots between."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _find_sets(tensors: StateDict, path: str = "") -> Iterator[tuple[str, StateDict]]:
    """The sets of a known format, each with the keys that lead to it; one inside another counts if it has a role."""
    inner: dict[str, StateDict] = {}
    for name, value in tensors.items():
        key, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(key, {})[rest] = value
    aside = {key: state for key, state in inner.items() if _role(key)}
    own = {
        name: value
        for name, value in tensors.items()
        if name.partition(".")[0] not in aside and ("." in name or value.ndim)  # no weight is a number at the top
    }
    if is_known(own):
        yield path, own
        inner = aside
    for key, state in inner.items():
        yield from _find_sets(state, f"{path}.{key}".lstrip("."))


def _role(path: str) -> int:
    """The index in ROLES of what is under these keys."""
    keys = path.split(".")
    return next((i for i, words in enumerate(_OTHER_ROLES, 1) if any(words.search(key) for key in keys)), 0)
