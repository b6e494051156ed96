"""JPEGs like ImageNet's, made from the photographs that scikit-image and scikit-learn contain.

The sizes are modelled on ImageNet's: most images are 500 px by 375 or 333 px, a quarter has any size; the mean is about
475x420. The quality of each is set to ImageNet's mean number of bytes per pixel.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

BYTES_PER_PIXEL = 107e3 / (485 * 400)
_SIZES = [(500, 375), (375, 500), (500, 333), (333, 500), (500, 500), (500, 400), (500, 334), (640, 480)]
_SHARES = [0.36, 0.10, 0.12, 0.03, 0.03, 0.03, 0.03, 0.05]
"""The rest, a quarter, has any size with sides of 300 to 560 px."""
_COLOUR = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")


@cache
def photographs() -> tuple[Image.Image, ...]:
    """The colour photographs, at full size."""
    photos = [getattr(skimage.data, name)() for name in _COLOUR] + list(load_sample_images().images)
    return tuple(Image.fromarray(np.ascontiguousarray(photo[..., :3])) for photo in photos)


def make_jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Distinct JPEGs, 4:2:0 as nearly all of ImageNet's are."""
    random = np.random.default_rng(seed)
    for number in range(count):
        photo = photographs()[number % len(photographs())]
        kind = random.choice(len(_SIZES) + 1, p=[*_SHARES, 1 - sum(_SHARES)])
        width, height = _SIZES[kind] if kind < len(_SIZES) else (int(side) for side in random.integers(300, 561, 2))
        # A part of the photograph, at most half as large again when blown up.
        scale = max(width / photo.width, height / photo.height)
        part = float(random.uniform(max(0.66, min(1.0, scale)), 1.0)) if scale < 1.5 else 1.0
        crop_w = min(photo.width, photo.height * width / height) * part
        crop_h = crop_w * height / width
        left = random.uniform() * max(0.0, photo.width - crop_w)
        top = random.uniform() * max(0.0, photo.height - crop_h)
        view = photo.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + crop_w, top + crop_h))
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Files of smooth images stay far below any target, so the others may be larger.
        yield _encode(view, 1.38 * BYTES_PER_PIXEL * width * height)


def _encode(photo: Image.Image, target_bytes: float) -> bytes:
    """The JPEG between quality 40 and 98 whose size is the nearest below the target."""
    low, high, best = 40, 98, b""
    while low <= high:
        quality = (low + high) // 2
        stream = io.BytesIO()
        photo.save(stream, "JPEG", quality=quality, subsampling=2)
        fits = stream.tell() <= target_bytes
        if fits or not best:
            best = stream.getvalue()
        low, high = (quality + 1, high) if fits else (low, quality - 1)
    return best
