"""Search spaces of finetuning and of pretraining."""

from __future__ import annotations

from tune_spaces import (
    ablate_difficulty,
    ablate_fill,
    ablate_num_images,
    demo,
    demo_pretrain,
    detect,
    finetune,
    segment,
    wide,
    wide_optuna,
)
from tune_spaces.space import Space

SPACES: dict[str, Space] = {
    "demo": demo.SPACE,
    "demo_pretrain": demo_pretrain.SPACE,
    **finetune.SPACES,
    **detect.SPACES,
    **segment.SPACES,
    "wide": wide.SPACE,
    "wide_optuna": wide_optuna.SPACE,
    "ablate_num_images": ablate_num_images.SPACE,
    "ablate_fill": ablate_fill.SPACE,
    "ablate_difficulty": ablate_difficulty.SPACE,
}
"""All spaces by name."""
