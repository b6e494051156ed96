"""Draw the figures of docs/method.md: train each method for some minutes on the built-in shapes, show held-out images.

    python -m docs.images.make_method_figures [STEPS]

Writes simmim.png, mae.png and mixmae.png beside this file (default 900 steps of 16 images each).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmae.data.images.augment import centre_crop
from mixmae.data.images.decode import decode_rgb
from mixmae.data.shards.shapes import draw
from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.methods.mae import MAE, MAEConfig
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.mixing import cyclic_partners
from mixmae.panels import reconstruction_panel
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.schedule import learning_rate, run_length

SIZE, BATCH, ROWS = 192, 16, 2
NUM_TRAIN = 4000
SWIN = SwinConfig(
    image_size=SIZE, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_sizes=(8, 8, 12, 6)
)
DECODER = DecoderConfig(dim=96, depth=2, num_heads=4)
OPTIM = OptimConfig(base_lr=0.032)
MEAN, STD = 0.45, 0.25
"""Of the shapes' pixels, about."""


def images(start: int, stop: int) -> Tensor:
    """Shapes, (n, 3, SIZE, SIZE) uint8."""
    crops = [torch.from_numpy(centre_crop(decode_rgb(draw(0, i).jpeg), (SIZE, SIZE), 1.0)) for i in range(start, stop)]
    return torch.stack(crops)


def normalise(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def train(method: nn.Module, data: Tensor, steps: int) -> float:
    """Train without Ray.   Returns: the mean loss of the last 100 steps."""
    optimiser = build_optimizer(method, OPTIM)
    length = run_length(num_images=len(data), batch_size=BATCH, epochs=10, warmup_epochs=1, steps=steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, peak=OPTIM.peak_lr(BATCH), length=length)
        batch = normalise(data[torch.randint(len(data), (BATCH,), generator=generator)])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        loss = method(batch, generator=generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / len(losses[-100:])


def main(steps: int) -> None:
    torch.manual_seed(0)
    vit = ViTConfig(image_size=SIZE, embed_dim=192, depth=6, num_heads=3)
    methods: dict[str, nn.Module] = {
        "simmim": SimMIM(SwinEncoder(SWIN), SimMIMConfig()),
        "mae": MAE(ViTEncoder(vit), MAEConfig(decoder=DECODER)),
        "mixmae": MixMAE(SwinEncoder(SWIN), MixMAEConfig(num_images=2, decoder=DECODER)),
    }
    data, held_out = images(0, NUM_TRAIN), normalise(images(NUM_TRAIN, NUM_TRAIN + 2 * ROWS))
    for name, method in methods.items():
        loss = train(method, data, steps)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            if isinstance(method, MixMAE):
                partners = cyclic_partners(2 * ROWS, 2)[::2]
                step = method(held_out, generator=generator, partners=partners, with_pictures=True)
            else:
                step = method(held_out[:ROWS], generator=generator, with_pictures=True)
        panel = reconstruction_panel(step.pictures, mean=(MEAN,) * 3, std=(STD,) * 3)
        path = Path(__file__).with_name(f"{name}.png")
        panel.save(path, optimize=True)
        print(f"{path.name}: loss {loss:.3f} after {steps} steps, {path.stat().st_size / 1000:.0f} KB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 900)
