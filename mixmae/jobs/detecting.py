"""A trained detector ready to look at images of any size: in a run's evaluations, and afterwards.

Legend: C channels, h w an image's own size, H W of the canvas that it is fitted into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mixmae.convert.files import read_content
from mixmae.data.images.decode import Uint8Array
from mixmae.data.images.detect_augment import DetectAugmentConfig, fitted_size, write_canvas
from mixmae.detection.config import DetectorConfig
from mixmae.detection.model import Detector
from mixmae.detection.paste import paste_mask
from mixmae.encoders.build import build_encoder, config_from_json
from mixmae.inference import choose_device
from mixmae.jobs.config import DetectConfig
from mixmae.machine import Device
from mixmae.objects import Detections
from mixmae.pixels import normalise
from mixmae.training.checkpoint import MODEL_FILE, STATE_FILE, upgraded
from mixmae.training.run_folder import checkpoint_of

IMAGES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Finder:
    """A model, and how images are prepared for it."""

    model: Detector
    """In evaluation mode."""
    augment: DetectAugmentConfig
    """Its image_size is the canvas's (H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    bfloat16: bool = False
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    """The number of each class in its own file."""
    batch_size: int = IMAGES_AT_ONCE

    @property
    def channels(self) -> int:
        return len(self.mean)

    @torch.no_grad()
    def find(self, images: Sequence[Uint8Array]) -> list[Detections]:
        """Find the objects of images, (h, w, C) uint8 each: boxes in each image's own pixels, all on the CPU."""
        found = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            canvas = np.empty((len(part), self.channels, *self.augment.size), dtype=np.uint8)
            sizes = [fitted_size(pixels.shape[:2], self.augment.size) for pixels in part]
            for pixels, size, out in zip(part, sizes, canvas, strict=True):
                write_canvas(pixels, size, (0, 0, *size), out)
            batch = normalise(torch.from_numpy(canvas).to(self.device), mean=self.mean, std=self.std)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                detections = self.model.detect(batch, sizes)
            for objects, pixels, (height, width) in zip(detections, part, sizes, strict=True):
                factors = torch.tensor([pixels.shape[1] / width, pixels.shape[0] / height] * 2)
                masks = None if objects.masks is None else objects.masks.cpu()
                found.append(
                    Detections(objects.boxes.cpu() * factors, objects.scores.cpu(), objects.labels.cpu(), masks)
                )
        return found


def pasted(objects: Detections, size: tuple[int, ...]) -> Iterator[NDArray[np.bool_]]:
    """The masks of an image's detections, (h, w) bool each, one after the other.   Args: size: (h, w)."""
    assert objects.masks is not None
    for mask, box in zip(objects.masks, objects.boxes, strict=True):
        yield paste_mask(mask, box, (size[0], size[1]))


def is_detection(path: Path) -> bool:
    """Whether a path is a run of detection, or one of its checkpoints."""
    try:
        content = json.loads((checkpoint_of(path) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "detector" in content.get("config", {})


def load_finder(path: Path, *, device: Device = "auto", batch_size: int = IMAGES_AT_ONCE) -> Finder:
    """Build the model of a detection run's folder, its best weights, or of one of its checkpoints.

    Raises: ValueError if it is no such run.
    """
    folder = checkpoint_of(path)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        config, classes = upgraded(state["config"]), tuple(state["classes"])
        settings = DetectorConfig(**_tuples(config["detector"]))
        numbers = tuple(state["category_ids"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run of pipelines/detect.py, nor a checkpoint of one ({error!r})") from error
    encoder = build_encoder(config_from_json({**config["encoder"], "image_size": config["augment"]["image_size"]}))
    model = Detector(encoder, len(classes), settings)
    model.load_state_dict(read_content(folder / MODEL_FILE))
    place = choose_device(device)
    return Finder(
        model=model.to(place).eval(),
        augment=DetectAugmentConfig(**_tuples(config["augment"])),
        mean=tuple(config["pixel_mean"]),
        std=tuple(config["pixel_std"]),
        device=place,
        class_names=classes,
        category_ids=numbers,
        batch_size=batch_size,
    )


def finder_of(
    model: nn.Module, config: DetectConfig, class_names: Sequence[str], category_ids: Sequence[int]
) -> Finder:
    """The model of a run under way."""
    assert isinstance(model, Detector)
    return Finder(
        model=model,
        augment=config.augment,
        mean=config.pixel_mean,
        std=config.pixel_std,
        device=next(model.parameters()).device,
        bfloat16=config.loop.precision == "bfloat16",
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
