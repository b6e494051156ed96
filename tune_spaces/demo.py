"""The sweep that everybody can run: minutes on two CPU cores."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Layer decay x drop path of the demo's very small Swin: 6 short trials, minutes on two CPU cores.

    At 96 px, with a quarter of the demo's computation. Such short trials show how a sweep works, not what is best.""",
    recipe="demo_finetune",
    vary={
        "optim.layer_decay": Choice((0.7, 0.75, 0.8)),
        "encoder.drop_path": Choice((0.0, 0.1)),
    },
    change={"augment.image_size": 96, "loop.warmup_epochs": 0.5, "loop.epochs": 4.0},
)
