"""Rate, layer decay and drop path of the paper's Swin-B on ADE20K: the paper prints none of the three."""

from __future__ import annotations

from tune_spaces.space import Choice, Space

SPACES = {
    "demo_segment": Space(
        about="""Rate x layer decay of the demo's segmentation: four short trials, on two CPU cores.""",
        recipe="demo_segment",
        vary={"optim.lr": Choice((3e-3, 1e-2)), "optim.layer_decay": Choice((0.75, 0.9))},
        metric="val/miou",
    ),
    "segment_ade20k": Space(
        about="""Rate x layer decay x drop path of Swin-Base/W14 on ADE20K: 24 trials of 160,000 steps.

    The values are those that BEiT, MAE's users and ConvMAE report for encoders of this size. Not yet run.""",
        recipe="mixmae_swin_base_ade20k_160k",
        vary={
            "optim.lr": Choice((1e-4, 2e-4, 4e-4, 7e-4)),
            "optim.layer_decay": Choice((0.65, 0.75, 0.85)),
            "encoder.drop_path": Choice((0.1, 0.2)),
        },
        metric="val/miou",
    ),
}
"""The spaces by name."""
