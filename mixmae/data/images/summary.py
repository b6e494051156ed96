"""Statistics of a set of images: counts, sizes, classes, mean and std of the pixels, and the broken files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixmae.data.images.decode import DecodeError, Uint8Array, decode_rgb, has_colour, image_size

SIZE_EDGES = (1, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
"""Buckets of the size histogram, by the shorter side in pixels; each begins at its edge, the last is open."""


@dataclass
class Summary:
    """Counts of a set of images; those of two parts merge into those of the whole."""

    num_images: int = 0
    num_bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    """By edge of the bucket."""
    smallest: tuple[int, int] | None = None
    """Width and height of the image with the shortest side."""
    largest: tuple[int, int] | None = None
    """Width and height of the image with the longest side."""
    num_decoded: int = 0
    num_grey: int = 0
    """Of the decoded images."""
    means: Any = field(default_factory=lambda: np.zeros(3))
    """(3,) float64: sum over decoded images of the mean of their pixels, 0 to 1, RGB."""
    squares: Any = field(default_factory=lambda: np.zeros(3))
    """(3,) float64: likewise of the squared pixels."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(where, reason)."""

    def add(self, data: bytes, label: int, where: str, *, decode: bool, problem: str = "") -> Uint8Array | None:
        """Count one image; one whose header cannot be read, or that does not decode if that is tried, is broken.

        Args: problem: why there are no bytes, if that is known.

        Returns: the pixels, (H, W, 3) uint8, if it was decoded.
        """
        self.num_images += 1
        self.num_bytes += len(data)
        self.labels[label] += 1
        try:
            height, width = image_size(data)
            pixels = decode_rgb(data) if decode else None
        except DecodeError as error:
            self.broken.append((where, problem or str(error)))
            return None
        self.sizes[max(edge for edge in SIZE_EDGES if edge <= min(height, width))] += 1
        self._extremes((width, height), (width, height))
        if pixels is not None:
            # Sums of bytes in integers are exact, and faster than floating point.
            flat = pixels.reshape(-1, 3)
            histograms = [np.bincount(flat[:, channel], minlength=256) for channel in range(3)]
            values = np.arange(256) / 255
            self.num_decoded += 1
            self.num_grey += not has_colour(pixels)
            self.means += [(histogram @ values) / len(flat) for histogram in histograms]
            self.squares += [(histogram @ values**2) / len(flat) for histogram in histograms]
        return pixels

    def merge(self, other: Summary) -> None:
        """Add the counts of another part."""
        self.num_images += other.num_images
        self.num_bytes += other.num_bytes
        self.labels += other.labels
        self.sizes += other.sizes
        if other.smallest is not None and other.largest is not None:
            self._extremes(other.smallest, other.largest)
        self.num_decoded += other.num_decoded
        self.num_grey += other.num_grey
        self.means += other.means
        self.squares += other.squares
        self.broken += other.broken

    def _extremes(self, small: tuple[int, int], large: tuple[int, int]) -> None:
        self.smallest = min(self.smallest or small, small, key=lambda size: (min(size), size))
        self.largest = max(self.largest or large, large, key=lambda size: (max(size), size))

    def as_dict(self, class_names: tuple[str, ...] | None) -> dict[str, Any]:
        """The summary as JSON: classes by name where they have one, pixels as mean and std.

        Every decoded image counts alike, whatever its size.
        """

        def called(label: int) -> str:
            return class_names[label] if class_names and label < len(class_names) else str(label)

        count = max(1, self.num_decoded)
        mean = self.means / count
        std = np.sqrt(np.maximum(self.squares / count - mean**2, 0))
        return {
            "images": self.num_images,
            "bytes": self.num_bytes,
            "unlabelled": self.labels.get(-1, 0),
            "classes": {called(label): count for label, count in sorted(self.labels.items()) if label >= 0},
            "shorter_side_px": {str(edge): self.sizes.get(edge, 0) for edge in SIZE_EDGES},
            "smallest_px": list(self.smallest) if self.smallest else None,
            "largest_px": list(self.largest) if self.largest else None,
            "pixels": {
                "images": self.num_decoded,
                "grey": self.num_grey,
                "mean": [round(float(value), 4) for value in mean],
                "std": [round(float(value), 4) for value in std],
            }
            if self.num_decoded
            else None,
            "broken": [{"where": where, "reason": reason} for where, reason in sorted(self.broken)],
        }
