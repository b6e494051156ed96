"""A wide space around the paper's settings, for random search; wide_optuna searches the same with Optuna."""

from tune_spaces.space import Asha, Choice, Space, Uniform

SPACE = Space(
    about="""Rate, decays, drop path, mixup and smoothing of Swin-Base/W14, drawn at random: 30 trials, ASHA.

    Ranges are ours, around the paper's values (table 12) and the official script's rate. Not yet run.""",
    recipe="mixmae_swin_base_finetune_100ep",
    vary={
        "optim.base_lr": Uniform(1e-4, 2e-3, log=True),
        "optim.weight_decay": Uniform(0.01, 0.3, log=True),
        "optim.layer_decay": Uniform(0.6, 0.9),
        "encoder.drop_path": Uniform(0.0, 0.4),
        "mixup.mixup": Choice((0.0, 0.2, 0.8)),
        "mixup.label_smoothing": Choice((0.0, 0.1)),
    },
    search="random",
    trials=30,
    scheduler=Asha(grace_epochs=10.0),
)
