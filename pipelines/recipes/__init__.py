"""Recipes: functions that each return one complete config. Paths and worker counts are never in them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from pipelines.recipes.config import PretrainConfig
from pipelines.recipes.demo import demo
from pipelines.recipes.mixmae_swin import (
    mixmae_swin_base_300ep,
    mixmae_swin_base_600ep,
    mixmae_swin_huge_300ep,
    mixmae_swin_huge_600ep,
    mixmae_swin_large_300ep,
    mixmae_swin_large_600ep,
)

PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        mixmae_swin_base_300ep,
        mixmae_swin_base_600ep,
        mixmae_swin_large_300ep,
        mixmae_swin_large_600ep,
        mixmae_swin_huge_300ep,
        mixmae_swin_huge_600ep,
    )
}


def find_recipe(name: str) -> Callable[[], PretrainConfig]:
    """The pretraining recipe of this name.   Raises: ValueError that offers the nearest names."""
    if name in PRETRAIN_RECIPES:
        return PRETRAIN_RECIPES[name]
    near = difflib.get_close_matches(name, PRETRAIN_RECIPES, n=3, cutoff=0.4) or list(PRETRAIN_RECIPES)
    raise ValueError(f"There is no recipe {name!r}: did you mean {', '.join(near)}?")


def list_recipes() -> str:
    """A line a recipe: its name and the first sentence of its docstring."""
    width = max(map(len, PRETRAIN_RECIPES))
    return "\n".join(
        f"  {name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in PRETRAIN_RECIPES.items()
    )
