"""How many images are mixed: the paper's table 8."""

from tune_spaces.space import Choice, Space

SPACE = Space(
    about="""Images per mix, 2 to 5, in pretraining Swin-Base/W14: 4 trials of 300 epochs.

    The more images, the more of each is hidden: 50, 67, 75 and 80 %. A batch of 960 can be divided by 2 to 5 images
    and by 8 workers. The paper judges by finetuning (84.6, 84.7, 84.8, 84.5 % top-1, table 8), the sweep by a probe.
    Not yet run.""",
    recipe="mixmae_swin_base_300ep_images_2",
    vary={"method.num_images": Choice((2, 3, 4, 5))},
    change={"loop.batch_size": 960},
    metric="probe/linear_top1",
)
