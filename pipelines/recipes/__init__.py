"""Recipes: functions that each return one complete config. Paths and worker counts are never in them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipelines.recipes.config import PretrainConfig
from pipelines.recipes.demo import demo
from pipelines.recipes.finetune import FINETUNE_RECIPES
from pipelines.recipes.mixmae_swin import (
    mixmae_swin_base_300ep,
    mixmae_swin_base_600ep,
    mixmae_swin_huge_300ep,
    mixmae_swin_huge_600ep,
    mixmae_swin_large_300ep,
    mixmae_swin_large_600ep,
)

__all__ = ["FINETUNE_RECIPES", "PRETRAIN_RECIPES", "find_recipe", "list_recipes"]

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


RecipeT = TypeVar("RecipeT", bound=Callable[[], Any])


def find_recipe(name: str, recipes: Mapping[str, RecipeT]) -> RecipeT:
    """The recipe of this name in a table.   Raises: ValueError that offers the nearest names."""
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.4) or list(recipes)
    raise ValueError(f"There is no recipe {name!r}: did you mean {', '.join(near)}?")


def list_recipes(recipes: Mapping[str, Callable[[], Any]]) -> str:
    """A line a recipe: its name and the first sentence of its docstring."""
    width = max(map(len, recipes))
    return "\n".join(f"  {name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in recipes.items())
