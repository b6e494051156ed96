"""How hard the pretext task is beside the number of images: mask tokens and single reconstruction."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Mask tokens x dual reconstruction in pretraining Swin-Base/W14 with 2 images: 6 trials of 300 epochs.

    A share of mask tokens among the cells hides 50, 62.5 or 75 % of each image; without dual reconstruction only the
    first image is reconstructed. The paper judges by finetuning (84.6 % top-1; with half mask tokens 84.4, table 8;
    single 84.0, table 9), the sweep by its probe. Not yet run.""",
    recipe="mixmae_swin_base_300ep_images_2",
    vary={"method.mask_token_share": Choice((0.0, 0.25, 0.5)), "method.dual": Choice((True, False))},
    metric="probe/linear_top1",
)
