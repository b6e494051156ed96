"""Rate, layer decay and drop path of the paper's Swin-B on COCO: the paper prints the layer decay alone."""

from __future__ import annotations

from tune_spaces.space import Choice, Space

SPACES = {
    "demo_detect": Space(
        about="""Rate x layer decay of the demo's detection: four short trials, on two CPU cores.""",
        recipe="demo_detect",
        vary={"optim.lr": Choice((5e-4, 1e-3)), "optim.layer_decay": Choice((0.75, 0.9))},
        metric="val/box_ap",
    ),
    "detect_coco": Space(
        about="""Rate x layer decay x drop path of Swin-Base/W14 on COCO: 24 trials of 55 epochs.

    MAE chose the rate of 8e-5 in a grid around 1.6e-4, and drop path 0.1; longer runs may want more. Not yet run.""",
        recipe="mixmae_swin_base_coco_55ep",
        vary={
            "optim.lr": Choice((5e-5, 8e-5, 1e-4, 1.6e-4)),
            "optim.layer_decay": Choice((0.8, 0.85)),
            "encoder.drop_path": Choice((0.1, 0.2, 0.3)),
        },
        metric="val/box_ap",
    ),
}
"""The spaces by name."""
