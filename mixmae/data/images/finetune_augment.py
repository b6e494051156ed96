"""RandAugment and random erasing for finetuning; the random numbers depend on (seed, epoch, row) alone.

RandAugment is timm's "rand-m9-mstd0.5-inc1": two of fifteen operations are drawn with replacement, each is carried out
with probability 0.5, and its strength is drawn around 9 of 10; "inc1" means that every operation distorts more as the
strength grows. Source: Cubuk et al., "RandAugment" (2019); the operations' ranges as documented in timm 1.0.
Random erasing: Zhong et al., "Random Erasing Data Augmentation" (2017), with noise in every pixel as timm does it. Ours
works on uint8 before normalisation, so the noise ends at 0 and 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.decode import Uint8Array
from mixmae.data.order import Draw, uniforms
from mixmae.pixels import usual_normalisation

_FILL: dict[str, int | tuple[int, ...]] = {"L": 117, "RGB": (124, 116, 104), "RGBA": (124, 116, 104, 255)}
"""ImageNet's mean colour, for the area that a rotated or shifted image leaves free."""
Operation = Callable[[Image.Image, float, float], Image.Image]
"""(image, strength in [0, 1], sign) -> image."""

_FULL = 10.0
_DRAWS_PER_OPERATION = 5
_ERASING_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class FinetuneAugmentConfig(AugmentConfig):
    """What is done to an image of finetuning; the default is the paper's."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the crop as shares of the image's area."""
    num_operations: int = 2
    """RandAugment's operations per image; 0 for none."""
    magnitude: float = 9.0
    """Mean strength of an operation, 0 to 10."""
    magnitude_std: float = 0.5
    """Std of the strength."""
    operation_probability: float = 0.5
    """Probability that a chosen operation is carried out."""
    erasing: float = 0.25
    """Probability that a rectangle is filled with noise."""
    erasing_area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest area of the rectangle as shares of the image's area."""
    erasing_ratio: float = 0.3
    """Smallest height / width of the rectangle; the largest is its inverse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_operations < 0:
            raise ValueError(f"num_operations is {self.num_operations}: give 0 for none, or more")
        if not 0 <= self.magnitude <= _FULL or self.magnitude_std < 0:
            raise ValueError(f"magnitude is {self.magnitude} +- {self.magnitude_std}: give 0 to 10, and a std >= 0")
        for name in ("operation_probability", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a probability in [0, 1]")
        low, high = self.erasing_area
        if not 0 < low <= high < 1:
            raise ValueError(f"erasing_area is {self.erasing_area}: give two shares with 0 < low <= high < 1")
        if not 0 < self.erasing_ratio <= 1:
            raise ValueError(f"erasing_ratio is {self.erasing_ratio}: give a ratio in (0, 1]")


def augment_further(config: FinetuneAugmentConfig, image: Uint8Array, *, seed: int, epoch: int, row: int) -> None:
    """RandAugment and random erasing of a cropped image, in place.

    Args: image: (C, H, W) uint8: grey, RGB or RGBA.  seed, epoch, row: the keys of the draw.
    """
    keys = (seed, np.array([epoch]), np.array([row]))
    if config.num_operations:
        draws = uniforms(config.num_operations * _DRAWS_PER_OPERATION, Draw.RAND_AUGMENT, *keys)
        _rand_augment(config, image, draws.reshape(config.num_operations, _DRAWS_PER_OPERATION))
    if config.erasing:
        draws = uniforms(1 + 4 * _ERASING_ATTEMPTS, Draw.RANDOM_ERASING, *keys)[0]
        if draws[0] < config.erasing:
            box = _erasing_box(config, image.shape[1:], draws[1:].reshape(_ERASING_ATTEMPTS, 4))
            if box is not None:
                top, left, height, width = box
                noise = _noise((len(image), height, width), *keys)
                image[:, top : top + height, left : left + width] = noise


def _rand_augment(config: FinetuneAugmentConfig, image: Uint8Array, draws: NDArray[np.float64]) -> None:
    changed: Image.Image | None = None
    for choice, doing, first, second, sign in draws.tolist():
        if doing >= config.operation_probability:
            continue
        normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)  # Box and Muller
        strength = min(_FULL, max(0.0, config.magnitude + config.magnitude_std * normal)) / _FULL
        if changed is None:
            changed = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        operation = OPERATIONS[int(choice * len(OPERATIONS))]
        alpha = changed.getchannel("A") if changed.mode == "RGBA" and operation not in _GEOMETRIC else None
        if alpha is not None:  # an operation on colours
            changed = changed.convert("RGB")
        changed = operation(changed, strength, -1.0 if sign < 0.5 else 1.0)
        if alpha is not None:
            changed.putalpha(alpha)
    if changed is not None:
        pixels = np.asarray(changed)
        image[:] = pixels if len(image) == 1 else pixels.transpose(2, 0, 1)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=_FILL[image.mode]
    )


def _enhance(
    kind: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * strength))


def _solarize_add(image: Image.Image, strength: float, sign: float) -> Image.Image:
    added = min(128, int(strength * 110))
    levels = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(levels * len(image.getbands()))


OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.invert(image),
    lambda image, strength, sign: image.rotate(
        sign * 30 * strength, resample=Image.Resampling.BICUBIC, fillcolor=_FILL[image.mode]
    ),
    lambda image, strength, sign: ImageOps.posterize(image, max(1, 4 - int(strength * 4))),
    lambda image, strength, sign: ImageOps.solarize(image, 256 - min(256, int(strength * 256))),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height),
)
"""RandAugment's operations. The order is part of a run's random draws: never change it. On grey images the change of
saturation (ImageEnhance.Color) does nothing."""
_GEOMETRIC = (OPERATIONS[3], *OPERATIONS[-4:])
"""Those that move pixels, and alpha with them; the others change colours and leave alpha as it is."""


def _erasing_box(
    config: FinetuneAugmentConfig, size: tuple[int, ...], draws: NDArray[np.float64]
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of the first attempt that fits; None if none does."""
    height, width = size
    low, high = config.erasing_area
    widest = -math.log(config.erasing_ratio)
    for area, shape, down, right in draws.tolist():
        target = (low + area * (high - low)) * height * width
        ratio = math.exp((2 * shape - 1) * widest)
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < h < height and 0 < w < width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    return None


def _noise(shape: tuple[int, int, int], seed: int, epoch: NDArray[np.int64], row: NDArray[np.int64]) -> Uint8Array:
    """What would be standard normal noise in normalised pixels, as uint8."""
    count = math.prod(shape)
    # One more key than the rectangle's draw has, so that the numbers are others.
    draws = uniforms(2 * -(-count // 2), Draw.RANDOM_ERASING, seed, epoch, row, 1)[0].reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log1p(-draws[0])), 2 * np.pi * draws[1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
    mean, std = (np.array(values)[:, None, None] for values in usual_normalisation(shape[0]))
    return np.clip(np.rint(255 * (mean + std * normal)), 0, 255).astype(np.uint8)
