"""Draw the figures of docs/method.md: train each method as long as the demo, on its moths, and show held-out images.

    python -m docs.images.make_method_figures [STEPS]

Writes simmim.png, mae.png and mixmae.png beside this file. Shards and nothing else go to runs/method_figures.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mixmae.data.blocks import eval_batch
from mixmae.data.prepare import open_for_training
from mixmae.encoders.vit import ViTConfig
from mixmae.jobs.config import PretrainConfig
from mixmae.jobs.in_process import build_seeded, train_in_process
from mixmae.jobs.pretraining import PretrainJob
from mixmae.methods.mae import MAEConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from pipelines.recipes.demo import demo

ROWS = 2


def configs() -> dict[str, PretrainConfig]:
    """The demo with each method; MAE needs a ViT, and two images per mix are easier to follow than four."""
    base = demo()
    assert isinstance(base.method, MixMAEConfig)
    vit = ViTConfig(image_size=base.augment.image_size, patch_px=8, embed_dim=96, depth=4, num_heads=3)
    return {
        "simmim": replace(base, method=SimMIMConfig()),
        "mae": replace(base, encoder=vit, method=MAEConfig(decoder=base.method.decoder)),
        "mixmae": replace(base, method=replace(base.method, num_images=2)),
    }


def main(steps: int | None = None) -> None:
    folder = Path("runs/method_figures")
    source, validation = open_for_training("moths", folder, 0)
    for name, config in configs().items():
        if steps:
            config = replace(config, loop=replace(config.loop, steps=steps))
        job = PretrainJob.of(config, source, validation, data=None, folder=folder)
        model = build_seeded(job)
        state = train_in_process(job, model)
        num_images = config.method.images_mixed
        images = config.normalise(eval_batch(validation, range(ROWS * num_images), config.augment.image_size))
        chosen = {"partners": cyclic_partners(len(images), num_images)[::num_images]} if num_images > 1 else {}
        with torch.no_grad():
            step = model(images, generator=torch.Generator().manual_seed(1), with_pictures=True, **chosen)
        path = Path(__file__).with_name(f"{name}.png")
        panel = reconstruction_panel(step.pictures, mean=config.pixel_mean, std=config.pixel_std)
        panel.save(path, optimize=True)
        print(f"{path.name}: loss {state.metrics['loss']:.3f} after {state.step} steps", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
