"""The sweep that everybody can run: minutes on two CPU cores."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Layer decay x drop path of the demo's very small Swin: 6 short trials, minutes on two CPU cores.

    All labels of the set, five epochs. Beside them runs the same budget from scratch.""",
    recipe="demo_finetune",
    vary={
        "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
        "encoder.drop_path": Choice((0.0, 0.1)),
    },
    change={"loop.epochs": 5.0},
)
