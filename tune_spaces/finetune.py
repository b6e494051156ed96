"""Layer decay and drop path of the paper's Swins: on ImageNet-1K, and on the sets of table 5."""

from __future__ import annotations

from tune_spaces.space import Choice, Space
from tune_spaces.transfer import TRANSFERS


def _space(title: str, recipe: str, epochs: int, drop_paths: tuple[float, ...], source: str) -> Space:
    return Space(
        about=f"""Layer decay x drop path of {title}: 9 trials of {epochs} epochs.

    {source} Not yet run.""",
        recipe=recipe,
        vary={
            "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
            "encoder.drop_path": Choice(drop_paths),
        },
    )


SPACES = {
    **{
        f"finetune_swin_{size}": _space(
            f"Swin-{size.capitalize()}/W14",
            f"mixmae_swin_{size}_finetune_{epochs}ep",
            epochs,
            drop_paths,
            f"The paper (table 12) has layer decay 0.7 and drop path {paper}; the values around them are ours.",
        )
        for size, epochs, paper, drop_paths in (
            ("base", 100, 0.15, (0.1, 0.15, 0.2)),
            ("large", 50, 0.2, (0.15, 0.2, 0.3)),
            ("huge", 50, 0.3, (0.2, 0.3, 0.4)),
        )
    },
    **{
        f"finetune_{transfer.name}": _space(
            f"Swin-Base/W14 on {transfer.title}",
            f"mixmae_swin_base_{transfer.name}_finetune_100ep",
            100,
            (0.1, 0.15, 0.2),
            """The paper adjusts the drop path for each set without printing it (appendix A.1): the values around
    ImageNet's 0.15 are ours. The values of the layer decay are the paper's (section 4).""",
        )
        for transfer in TRANSFERS
    },
}
"""The spaces by name, each a grid around the recipe's own settings."""
