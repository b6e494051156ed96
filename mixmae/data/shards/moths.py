"""The default built-in set: moths of 20 species, each on some ground, made from (seed, index) alone.

Why it is built so. In photos a class is seldom one thing: a fox is mostly russet, mostly furry, mostly in a wood and
mostly fox-shaped. Here each species has five traits: the form of its wings, the pattern of the fore wings, that of the
hind wings, its hue, and the ground it sits on. Each moth has each trait of its species with probability `lean`, and one
drawn from all species' otherwise. So no trait can be relied on, every trait helps, and only who sees several of them is
often right. `lean` is the difficulty: 1 gives five sure traits, at 0 the labels are noise. No two species share more
than one trait.

Reconstructing hidden cells from visible ones needs the traits: the left wings tell what the right ones look like, one
fore wing tells where the edge of the other is, and with what it is patterned. So what pretraining learns is of use for
the classes, as in nature. In the set of outlines (shapes.py) it is of none.

Pixels alone say little: a moth is lighter or darker than its ground, its marks are lighter or darker than its wings,
and a species has two colour morphs of opposite hue, all equally often; it is turned, moved, scaled and stretched, in
sloping light. So a linear classifier on pixels stays near the chance level of 1 in 20 (docs/data.md has the figures).

What it cannot show. The traits were chosen such that masked reconstruction can help. That it does says that the code
works and that one can measure it; it does not say what the method is worth on photos, nor which method is better there.
There is one moth per image, in full view, of 10 + 10 + 10 + 5 + 5 fixed traits that are independent given the species.

Every image knows its class, the box of its moth and its pixels.

Legend: s along a wing from the body (0) to its edge (1), t across it from -1 to 1; all lengths of a moth are in units
of its size, angles from straight outward (0) to up (90 degrees).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixmae.data.order import Draw, permutation, uniforms
from mixmae.data.shards.drawing import DrawnImage, Draws, FloatArray, clouds, finished, paint

GENERATOR_VERSION = 1
"""Raised whenever the images of a given (seed, index, lean) change."""

NUM_TRAIN = 4000
NUM_VALIDATION = 1000
MIN_SIDE_PX, MAX_SIDE_PX = 72, 96

LEAN = 0.75
"""Probability that a trait is the species' own: the difficulty of the set."""

CLASS_NAMES = (
    *("brook", "cinder", "clover", "dusk", "ember", "fen", "garnet", "heath", "ivory", "juniper"),
    *("kestrel", "lichen", "marsh", "nettle", "ochre", "pine", "quartz", "rowan", "sedge", "thistle"),
)
"""Invented names, in alphabetical order."""

_NUM_DRAWS = 128
_NUM_HUES = 5
"""Pairs of opposite hues, evenly spread."""
_TURN = math.radians(45)
"""Moths are turned by up to this, either way."""
_TINTS = np.array([[0.35626, 0.0, -0.93439], [-0.82041, 0.47864, -0.31280]])
"""Two directions of RGB, at right angles and of length 1, that change no brightness (0.299 R + 0.587 G + 0.114 B)."""


class Traits(NamedTuple):
    """Indices of a moth's wing form, patterns, pair of opposite hues, and ground."""

    form: int
    fore: int
    hind: int
    hue: int
    ground: int


class Wing(NamedTuple):
    """The form of a wing: the direction of its middle in degrees, its length, and its half width in radians."""

    direction: float
    length: float
    width: float


@dataclass(frozen=True)
class Frame:
    """Where the pixels of an image lie on a moth; arrays are (H, W) float32."""

    radius: FloatArray
    angle: FloatArray
    """From -90 to 90 degrees, in radians: both sides of the moth are alike."""
    pixel: float
    """Side of a pixel in units of the moth."""


def species(label: int) -> Traits:
    """Give the traits of a species, an index into CLASS_NAMES: no two species share more than one."""
    half, number = divmod(label, 10)
    fifth = number // 5
    return Traits(
        form=number,
        fore=(number + 2 * half) % 10,
        hind=(9 * number + 3 * half) % 10,
        hue=(number + half + 2 * fifth) % 5,
        ground=(number + 4 * half + fifth) % 5,
    )


def draw(seed: int, index: int, lean: float = LEAN) -> DrawnImage:
    """Draw one image; any 20 consecutive images from a multiple of 20 hold every species once.

    Args:
        seed: of the set.
        index: >= 0; the default set trains on the first 4,000 and validates on the next 1,000.
        lean: probability, for each trait, that it is the species' own, 0..1. For a given (seed, index), a larger one
            changes nothing but that more traits become the species'.
    """
    num_classes = len(CLASS_NAMES)
    label = int(permutation(num_classes, Draw.MOTHS, seed, 0, index // num_classes)[index % num_classes])
    draws = Draws(uniforms(_NUM_DRAWS, Draw.MOTHS, seed, 1, index)[0])
    traits = _draw_traits(draws, species(label), lean)
    height, width = (draws.integer(MIN_SIDE_PX, MAX_SIDE_PX) for _ in range(2))

    dark = draws.between(60, 110)
    light = dark + draws.between(60, 100)
    ground, wings = (dark, light) if draws.between(0, 1) < 0.5 else (light, dark)
    canvas = _ground(draws, height, width, traits.ground, ground)

    hue = (traits.hue + draws.between(-0.25, 0.25)) / (2 * _NUM_HUES) + 0.5 * draws.integer(0, 1)
    step = draws.between(30, 45) * (1 if draws.between(0, 1) < 0.5 else -1)
    chroma = draws.between(40, 70)
    base = _colour(hue, wings - step, chroma)
    mark = _colour(hue + draws.between(-0.08, 0.08), wings + step, 0.7 * chroma)
    frame = _frame(draws, height, width)
    fore, hind = (_varied(draws, wing) for wing in _FORMS[traits.form])
    moth = np.zeros((height, width), dtype=np.float32)
    for wing, pattern in ((hind, traits.hind), (fore, traits.fore)):
        coverage, marked = _wing(frame, wing, _PATTERNS[pattern])
        canvas = paint(canvas, coverage, base + marked[..., None] * (mark - base))
        moth = np.maximum(moth, coverage)
    body = _body(frame)
    canvas = paint(canvas, body, _colour(hue, ground, 20.0))
    moth = np.maximum(moth, body)
    return finished(canvas * _light(draws, height, width)[..., None], moth, label)


def _draw_traits(draws: Draws, own: Traits, lean: float) -> Traits:
    """Take each trait from the species or from all. Both numbers of a trait are drawn whichever it is."""

    def trait(value: int, count: int) -> int:
        keep, other = draws.between(0, 1) < lean, draws.integer(0, count - 1)
        return value if keep else other

    return Traits(*map(trait, own, (len(_FORMS), len(_PATTERNS), len(_PATTERNS), _NUM_HUES, len(_GROUNDS))))


def _colour(hue: float, brightness: float, chroma: float) -> FloatArray:
    """A colour (3,) float32 of the given brightness, of as much of the chroma as RGB has room for.

    Args: hue: in turns; hue + 0.5 is the opposite one.
    """
    angle = 2 * math.pi * hue
    brightness = min(max(brightness, 30.0), 225.0)
    tint = math.cos(angle) * _TINTS[0] + math.sin(angle) * _TINTS[1]
    room = np.where(tint > 0, 255 - brightness, brightness) / np.maximum(np.abs(tint), 1e-6)
    return np.asarray(brightness + min(chroma, float(room.min())) * tint, dtype=np.float32)


def _ground(draws: Draws, height: int, width: int, kind: int, brightness: float) -> FloatArray:
    """A ground of any hue, grained tone on tone: (H, W, 3) float32."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    turn, period = draws.between(0, math.pi), draws.between(12, 20)
    along = (x * math.cos(turn) + y * math.sin(turn)) * (2 * math.pi / period) + draws.between(0, 2 * math.pi)
    across = (y * math.cos(turn) - x * math.sin(turn)) * (2 * math.pi / period) + draws.between(0, 2 * math.pi)
    colour = _colour(draws.between(0, 1), brightness, draws.between(10, 40))
    rough, smooth = clouds(draws, height, width), clouds(draws, height, width)
    return colour + (14 * _GROUNDS[kind](along, across, rough) + 8 * smooth)[..., None]


_GROUNDS: tuple[Callable[[FloatArray, FloatArray, FloatArray], FloatArray], ...] = (
    lambda along, across, rough: np.sin(along),  # furrows
    lambda along, across, rough: 1.5 * np.sin(along) * np.sin(across),  # weave
    lambda along, across, rough: 1.5 * rough,  # stains
    lambda along, across, rough: np.sin(along + 1.5 * np.sin(0.5 * across)),  # waves
    lambda along, across, rough: 2 * np.abs(np.sin(0.5 * along)) - 1,  # cracks
)


def _frame(draws: Draws, height: int, width: int) -> Frame:
    """Place a moth: its size, turn, stretch and centre; at most the tips of its wings are outside the image."""
    size = draws.between(0.40, 0.54) * min(height, width)
    turn, stretch = draws.between(-_TURN, _TURN), math.exp(draws.between(-0.12, 0.12))
    centre_x, centre_y = (
        side / 2 + draws.between(-1, 1) * (side / 2 - 0.4 * min(height, width)) for side in (width, height)
    )
    y, x = (
        np.arange(height, dtype=np.float32)[:, None] - centre_y,
        np.arange(width, dtype=np.float32)[None] - centre_x,
    )
    outward = np.abs(x * math.cos(turn) + y * math.sin(turn)) / (size * stretch)
    up = (x * math.sin(turn) - y * math.cos(turn)) * stretch / size
    return Frame(radius=np.hypot(outward, up), angle=np.arctan2(up, outward + 1e-6), pixel=1 / size)


def _varied(draws: Draws, wing: Wing) -> Wing:
    """The wing of one moth: no two of a species are quite alike."""
    return Wing(wing.direction + draws.between(-4, 4), wing.length * draws.between(0.94, 1.06), wing.width)


def _wing(
    frame: Frame, wing: Wing, pattern: Callable[[FloatArray, FloatArray], FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Both wings of a pair: how much of each pixel they cover, how much of that their pattern marks; (H, W) each."""
    across = (frame.angle - math.radians(wing.direction)) / wing.width
    edge = wing.length * np.sqrt(np.maximum(1 - np.abs(across) ** 2.5, 0))
    coverage = np.clip((edge - frame.radius) / frame.pixel + 0.5, 0, 1) * (edge > 0)
    along = np.minimum(frame.radius / np.maximum(edge, 1e-3), 2)
    inside = pattern(along, np.clip(across, -1.5, 1.5))
    return coverage, np.clip(inside * wing.length / frame.pixel + 0.5, 0, 1)


def _body(frame: Frame) -> FloatArray:
    """How much of each pixel the body covers, an ellipse along the middle: (H, W)."""
    outward, up = frame.radius * np.cos(frame.angle), frame.radius * np.sin(frame.angle)
    return np.clip((0.09 - np.hypot(outward, 0.16 * up)) / frame.pixel + 0.5, 0, 1)


def _light(draws: Draws, height: int, width: int) -> FloatArray:
    """A slope of light over the image: (H, W) factors about 1, float32."""
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in (height, width))
    angle, slope, level = draws.between(0, 2 * math.pi), draws.between(0.05, 0.3), draws.between(0.9, 1.1)
    return level * (1 + slope * (math.sin(angle) * y[:, None] + math.cos(angle) * x[None]))


_FORMS: tuple[tuple[Wing, Wing], ...] = (
    (Wing(35, 1.00, 0.55), Wing(-40, 0.75, 0.60)),
    (Wing(20, 1.00, 0.40), Wing(-45, 0.95, 0.40)),
    (Wing(50, 1.00, 0.45), Wing(-25, 0.60, 0.55)),
    (Wing(30, 0.85, 0.70), Wing(-50, 0.85, 0.50)),
    (Wing(10, 1.00, 0.50), Wing(-55, 0.55, 0.45)),
    (Wing(60, 0.90, 0.40), Wing(-30, 1.00, 0.45)),
    (Wing(40, 1.00, 0.32), Wing(-20, 0.90, 0.32)),
    (Wing(25, 0.70, 0.55), Wing(-60, 1.00, 0.35)),
    (Wing(45, 0.95, 0.60), Wing(-60, 0.50, 0.60)),
    (Wing(5, 0.90, 0.35), Wing(-35, 0.70, 0.35)),
)
"""Fore and hind wings."""


def _band(s: FloatArray, middle: float, half: float) -> FloatArray:
    return half - np.abs(s - middle)


def _spot(s: FloatArray, t: FloatArray, along: float, across: float, radius: float) -> FloatArray:
    return radius - np.hypot(s - along, 0.6 * (t - across))


_PATTERNS: tuple[Callable[[FloatArray, FloatArray], FloatArray], ...] = (
    lambda s, t: s - 0.78,  # border
    lambda s, t: _band(s, 0.58, 0.12),  # band
    lambda s, t: np.maximum(_band(s, 0.40, 0.08), _band(s, 0.75, 0.08)),  # two bands
    lambda s, t: np.minimum(_spot(s, t, 0.62, 0, 0.26), -_spot(s, t, 0.62, 0, 0.11)),  # eye
    lambda s, t: np.maximum(_spot(s, t, 0.70, -0.55, 0.15), _spot(s, t, 0.70, 0.55, 0.15)),  # two spots
    lambda s, t: 0.1 * np.cos(3 * math.pi * t) * s,  # rays
    lambda s, t: 0.48 - s,  # dark base
    lambda s, t: 0.5 * t * s,  # one half
    lambda s, t: _spot(s, t, 0.62, 0, 0.20),  # spot
    lambda s, t: np.full_like(s, -1.0),  # plain
)
"""How far inside the mark a point of a wing is, in wing lengths; below 0 outside."""
