"""Search spaces of finetuning, one a file."""

from __future__ import annotations

from tune_spaces import demo, finetune_swin_base, finetune_swin_huge, finetune_swin_large, wide, wide_optuna
from tune_spaces.space import Space

SPACES: dict[str, Space] = {
    module.__name__.removeprefix("tune_spaces."): module.SPACE
    for module in (demo, finetune_swin_base, finetune_swin_large, finetune_swin_huge, wide, wide_optuna)
}
"""All spaces by name."""
