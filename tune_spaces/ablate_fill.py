"""What hidden cells hold: the paper's tables 6 and 10."""

from tune_spaces.space import Choice, Space

FILLS = ("mix", "zero", "learnable", "shuffle", "zoom")

SPACE = Space(
    about="""What fills hidden cells, and whether attention is masked, in pretraining Swin-Base/W14: 6 trials.

    Each trial has 300 epochs. Only a mix has images to keep apart: the other fills run without masked attention. The
    paper judges by finetuning (mix 84.6 % top-1, 84.4 without masked attention, zero 84.1, learnable 84.1, shuffle
    82.6, zoom 83.5; tables 6 and 10), the sweep by a probe. Not yet run.""",
    recipe="mixmae_swin_base_300ep_images_2",
    vary={"method.fill": Choice(FILLS), "method.unmixing": Choice(("attention", "none"))},
    without=tuple({"method.fill": fill, "method.unmixing": "attention"} for fill in FILLS[1:]),
    metric="probe/linear_top1",
)
