"""Layer decay and drop path of the paper's Swin-Base on ImageNet-1K."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Layer decay x drop path of Swin-Base/W14: 9 trials of 100 epochs.

    The paper (table 12) has layer decay 0.7 and drop path 0.15; the values around them are ours. Not yet run.""",
    recipe="mixmae_swin_base_finetune_100ep",
    vary={
        "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
        "encoder.drop_path": Choice((0.1, 0.15, 0.2)),
    },
)
