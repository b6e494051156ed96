"""Search spaces of finetuning and of pretraining, one a file."""

from __future__ import annotations

from tune_spaces import (
    ablate_difficulty,
    ablate_fill,
    ablate_num_images,
    demo,
    demo_pretrain,
    finetune_inat2018,
    finetune_inat2019,
    finetune_places205,
    finetune_places365,
    finetune_swin_base,
    finetune_swin_huge,
    finetune_swin_large,
    wide,
    wide_optuna,
)
from tune_spaces.space import Space

SPACES: dict[str, Space] = {
    module.__name__.removeprefix("tune_spaces."): module.SPACE
    for module in (
        demo,
        demo_pretrain,
        finetune_swin_base,
        finetune_swin_large,
        finetune_swin_huge,
        finetune_inat2018,
        finetune_inat2019,
        finetune_places205,
        finetune_places365,
        wide,
        wide_optuna,
        ablate_num_images,
        ablate_fill,
        ablate_difficulty,
    )
}
"""All spaces by name."""
