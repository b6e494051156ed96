"""Layer decay and drop path of the paper's Swin-Base on iNaturalist 2018."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Layer decay x drop path of Swin-Base/W14 on iNaturalist 2018: 9 trials of 100 epochs.

    The paper adjusts the drop path for each set but does not print it (appendix A.1): the values around ImageNet's 0.15
    are ours. It sweeps the layer decay as here (section 4). Not yet run.""",
    recipe="mixmae_swin_base_inat2018_finetune_100ep",
    vary={
        "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
        "encoder.drop_path": Choice((0.1, 0.15, 0.2)),
    },
)
