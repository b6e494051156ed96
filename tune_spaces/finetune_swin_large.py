"""Layer decay and drop path of the paper's Swin-Large on ImageNet-1K."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Layer decay x drop path of Swin-Large/W14: 9 trials of 50 epochs.

    The paper (table 12) has layer decay 0.7 and drop path 0.2; the values around them are ours. Not yet run.""",
    recipe="mixmae_swin_large_finetune_50ep",
    vary={
        "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
        "encoder.drop_path": Choice((0.15, 0.2, 0.3)),
    },
)
