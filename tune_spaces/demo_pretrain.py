"""The ablation that everybody can run: minutes on two CPU cores."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Images per mix x unmixing in pretraining the demo's very small Swin: 4 short trials.

    Minutes on two CPU cores. Such short trials show how an ablation is run, not what is best.""",
    recipe="demo",
    vary={"method.num_images": Choice((2, 4)), "method.unmixing": Choice(("attention", "none"))},
    change={"loop.steps": 500},
    metric="probe/linear_top1",
)
