"""Two ways to change how hard the pretext task is: mask tokens and single reconstruction (tables 8 and 9)."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Mask tokens x dual reconstruction in pretraining Swin-Base/W14 with 2 images: 6 trials of 300 epochs.

    With 0, 25 or 50 % mask tokens among the cells, 50, 62.5 or 75 % of each image is hidden; without dual
    reconstruction only the first image is reconstructed. The paper judges by finetuning (84.6 % top-1; with half mask
    tokens 84.4, table 8; single 84.0, table 9), the sweep by a probe. Not yet run.""",
    recipe="mixmae_swin_base_300ep_images_2",
    vary={"method.mask_token_share": Choice((0.0, 0.25, 0.5)), "method.dual": Choice((True, False))},
    metric="probe/linear_top1",
)
