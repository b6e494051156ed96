"""Recipes: functions that each return one complete config. Paths and worker counts are never in them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mixmae.jobs.config import PretrainConfig
from pipelines.recipes.demo import demo
from pipelines.recipes.detect import DETECT_RECIPES
from pipelines.recipes.finetune import FINETUNE_RECIPES
from pipelines.recipes.linear_probe import LINEAR_PROBE_RECIPES
from pipelines.recipes.mae import mae_vit_base_1600ep, mae_vit_large_1600ep
from pipelines.recipes.mixmae_ablations import MIXMAE_ABLATIONS
from pipelines.recipes.mixmae_encoders import (
    mixmae_pvt_large_600ep,
    mixmae_resnetv2_50x3_600ep,
    mixmae_resnetv2_101x3_600ep,
    mixmae_twins_svt_large_600ep,
    mixmae_vit_base_600ep,
)
from pipelines.recipes.mixmae_swin import (
    mixmae_swin_base_300ep,
    mixmae_swin_base_600ep,
    mixmae_swin_base_900ep,
    mixmae_swin_base_w7_600ep,
    mixmae_swin_huge_300ep,
    mixmae_swin_huge_600ep,
    mixmae_swin_large_300ep,
    mixmae_swin_large_600ep,
)
from pipelines.recipes.segment import SEGMENT_RECIPES
from pipelines.recipes.simmim import (
    simmim_pvt_large_800ep,
    simmim_swin_base_300ep,
    simmim_swin_base_w7_800ep,
    simmim_swin_large_800ep,
    simmim_twins_svt_large_800ep,
    simmim_vit_base_800ep,
)
from pipelines.recipes.small import SMALL_RECIPES

__all__ = [
    "DETECT_RECIPES",
    "FINETUNE_RECIPES",
    "LINEAR_PROBE_RECIPES",
    "PRETRAIN_RECIPES",
    "RECIPE_GROUPS",
    "SEGMENT_RECIPES",
    "find_recipe",
    "list_recipes",
]

Recipe = Callable[[], PretrainConfig]

RECIPE_GROUPS: dict[str, tuple[Recipe, ...]] = {
    "on any computer": (demo,),
    "small images, one GPU": tuple(SMALL_RECIPES),
    "MixMAE of Swin (the paper's tables 2 to 5)": (
        mixmae_swin_base_300ep,
        mixmae_swin_base_600ep,
        mixmae_swin_base_900ep,
        mixmae_swin_base_w7_600ep,
        mixmae_swin_large_300ep,
        mixmae_swin_large_600ep,
        mixmae_swin_huge_300ep,
        mixmae_swin_huge_600ep,
    ),
    "MixMAE of other encoders (tables 3, 17 and 19)": (
        mixmae_pvt_large_600ep,
        mixmae_twins_svt_large_600ep,
        mixmae_vit_base_600ep,
        mixmae_resnetv2_50x3_600ep,
        mixmae_resnetv2_101x3_600ep,
    ),
    "ablations of MixMAE (tables 6 to 10 and 13 to 16)": MIXMAE_ABLATIONS,
    "SimMIM (tables 2 to 4)": (
        simmim_swin_base_w7_800ep,
        simmim_swin_base_300ep,
        simmim_swin_large_800ep,
        simmim_pvt_large_800ep,
        simmim_twins_svt_large_800ep,
        simmim_vit_base_800ep,
    ),
    "MAE (tables 2, 4, 5 and 17)": (mae_vit_base_1600ep, mae_vit_large_1600ep),
}
"""The recipes of pretraining, by the headings of the list."""

PRETRAIN_RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipes in RECIPE_GROUPS.values() for recipe in recipes
}


RecipeT = TypeVar("RecipeT", bound=Callable[[], Any])


def find_recipe(name: str, recipes: Mapping[str, RecipeT], kind: str = "recipe") -> RecipeT:
    """The recipe of this name in a table.   Raises: ValueError, with the nearest names, if there is none."""
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.4)
    remedy = f"did you mean {', '.join(near)}?" if near else "the command without arguments lists them."
    raise ValueError(f"There is no {kind} {name!r}: {remedy}")


def list_recipes(recipes: Mapping[str, Callable[[], Any]]) -> str:
    """One line per recipe: its name and the first line of its docstring. Those of pretraining are under headings."""
    groups: Mapping[str, Iterable[Callable[[], Any]]] = {"": recipes.values()}
    if recipes is PRETRAIN_RECIPES:
        groups = RECIPE_GROUPS
    width = max(map(len, recipes))
    lines = []
    for heading, group in groups.items():
        lines += [f"\n  {heading}"] if heading else []
        lines += [f"    {recipe.__name__:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}" for recipe in group]
    return "\n".join(lines).removeprefix("\n")
