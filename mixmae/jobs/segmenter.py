"""A trained segmentation model ready to look at images of any size: in a run's evaluations, and afterwards.

Legend: N classes, C channels, h w an image's own size, H W of the model's windows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmae.convert.files import read_content
from mixmae.data.images.augment import resize
from mixmae.data.images.decode import Uint8Array
from mixmae.data.images.segment_augment import SegmentAugmentConfig, resized_size
from mixmae.encoders.build import build_encoder, config_from_json
from mixmae.inference import choose_device
from mixmae.jobs.config import SegmentConfig
from mixmae.machine import Device
from mixmae.pixels import normalise
from mixmae.segmentation.slide import slide
from mixmae.segmentation.upernet import UPerNet, UPerNetConfig, resized
from mixmae.training.checkpoint import MODEL_FILE, STATE_FILE, upgraded
from mixmae.training.run_folder import checkpoint_of

WINDOWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A model, and how images are prepared for it."""

    model: nn.Module
    """A UPerNet, in evaluation mode."""
    augment: SegmentAugmentConfig
    """Its image_size is the windows' (H, W), its shorter_px and longer_px are what images are resized to."""
    stride: int
    """Pixels between windows."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    bfloat16: bool = False
    class_names: tuple[str, ...] = ()
    batch_size: int = WINDOWS_AT_ONCE
    """Windows at once."""

    @property
    def channels(self) -> int:
        return len(self.mean)

    @torch.no_grad()
    def scores(self, images: Sequence[Uint8Array]) -> list[Tensor]:
        """Score the pixels of images, (h, w, C) uint8 each: (N, h, w) float32 each, on the device."""
        small = []
        for pixels in images:
            size = resized_size(pixels.shape[:2], self.augment.shorter_px, self.augment.longer_px)
            out = torch.empty((pixels.shape[2], *size), dtype=torch.uint8)
            resize(pixels, False, out)
            small.append(normalise(out[None].to(self.device), mean=self.mean, std=self.std)[0])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            scores = slide(self.model, small, window=self.augment.size, stride=self.stride, batch_size=self.batch_size)
        return [resized(score[None], pixels.shape[:2])[0] for score, pixels in zip(scores, images, strict=True)]

    def predict(self, images: Sequence[Uint8Array]) -> list[Uint8Array]:
        """The class of each pixel: (h, w) uint8 for each image."""
        return [score.argmax(dim=0).to("cpu", torch.uint8).numpy() for score in self.scores(images)]


def is_segmentation(path: Path) -> bool:
    """Whether a path is a run of segmentation, or one of its checkpoints."""
    try:
        content = json.loads((checkpoint_of(path) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "head" in content.get("config", {})


def load_segmenter(path: Path, *, device: Device = "auto", batch_size: int = WINDOWS_AT_ONCE) -> Segmenter:
    """Build the model of a segmentation run's folder, its best weights, or of one of its checkpoints.

    Raises: ValueError if it is no such run.
    """
    folder = checkpoint_of(path)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        config, classes = upgraded(state["config"]), tuple(state["classes"])
        head = UPerNetConfig(**_tuples(config["head"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run of pipelines/segment.py, nor a checkpoint of one ({error!r})") from error
    augment = SegmentAugmentConfig(**_tuples(config["augment"]))
    encoder = build_encoder(config_from_json({**config["encoder"], "image_size": config["augment"]["image_size"]}))
    model = UPerNet(encoder, len(classes), head)
    model.load_state_dict(read_content(folder / MODEL_FILE))
    place = choose_device(device)
    return Segmenter(
        model=model.to(place).eval(),
        augment=augment,
        stride=config["slide_stride"],
        mean=tuple(config["pixel_mean"]),
        std=tuple(config["pixel_std"]),
        device=place,
        class_names=classes,
        batch_size=batch_size,
    )


def segmenter_of(model: nn.Module, config: SegmentConfig, class_names: Sequence[str]) -> Segmenter:
    """The model of a run under way."""
    return Segmenter(
        model=model,
        augment=config.augment,
        stride=config.slide_stride,
        mean=config.pixel_mean,
        std=config.pixel_std,
        device=next(model.parameters()).device,
        bfloat16=config.loop.precision == "bfloat16",
        class_names=tuple(class_names),
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
