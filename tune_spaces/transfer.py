"""The other classification sets that the paper finetunes its Swins on (table 5).

Recipes (pipelines/recipes/finetune.py) and search spaces (tune_spaces/finetune.py) are both made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A set, and what the paper reaches on it."""

    name: str
    """Its word in the names of recipes and spaces."""
    title: str
    """As people write it."""
    num_classes: int
    train_images: int
    val_images: int
    source: str
    """Where the three counts are from."""
    base_top1: float
    """Top-1 of Swin-B/W14 in the paper, in %."""
    large_top1: float
    """Top-1 of Swin-L/W14 in the paper, in %."""


TRANSFERS = (
    Transfer(
        name="inat2018",
        title="iNaturalist 2018",
        num_classes=8_142,
        train_images=437_513,
        val_images=24_426,
        source="github.com/visipedia/inat_comp, 2018",
        base_top1=78.2,
        large_top1=80.6,
    ),
    Transfer(
        name="inat2019",
        title="iNaturalist 2019",
        num_classes=1_010,
        train_images=265_213,
        val_images=3_030,
        source="github.com/visipedia/inat_comp, 2019, and MLE-bench",
        base_top1=83.3,
        large_top1=84.4,
    ),
    Transfer(
        name="places205",
        title="Places205",
        num_classes=205,
        train_images=2_448_873,
        val_images=20_500,
        source='Zhou et al., "Places" (2017)',
        base_top1=68.6,
        large_top1=69.3,
    ),
    Transfer(
        name="places365",
        title="Places365-Standard",
        num_classes=365,
        train_images=1_803_460,
        val_images=36_500,
        source="github.com/zhoubolei/places_devkit",
        base_top1=59.0,
        large_top1=59.6,
    ),
)
