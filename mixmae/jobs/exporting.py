"""Models of segmentation and detection as programs: the forms that mixmae.convert.programs writes.

Legend: B images, C channels, H W pixels of the input, A anchors of all levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmae.convert.exported import Export, noise
from mixmae.convert.metadata import digest_of
from mixmae.detection.boxes import RPN_WEIGHTS, decode_boxes
from mixmae.detection.model import Detector
from mixmae.jobs.detecting import is_detection, load_finder
from mixmae.jobs.segmenter import is_segmentation, load_segmenter
from mixmae.panels import palette
from mixmae.segmentation.predictor import PixelClasses
from mixmae.segmentation.upernet import UPerNet


class DensePart(nn.Module):
    """What a detector computes for every pixel.

    Normalised (B, C, H, W) -> the levels of the pyramid, objectness (B, A) before the sigmoid, and the boxes (B, A, 4)
    of all anchors, x0 y0 x1 y1 in pixels of the input, not clipped.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels, logits, offsets = self.model.dense(images)
        anchors = torch.cat(self.model.anchors(levels))
        moved = torch.cat(offsets, dim=1)
        return *levels, torch.cat(logits, dim=1), decode_boxes(moved, anchors.expand_as(moved), RPN_WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class DenseExport:
    """A model of a dense task to export (mixmae.convert.exported.Program)."""

    kind: str
    """What file names call it."""
    model: nn.Module
    outputs: tuple[str, ...]
    about: dict[str, Any]
    channels: int
    size: tuple[int, int]
    """(H, W) of the input."""
    remark: str = ""
    """What is left out, for the line that is printed."""

    def images(self, batch: int) -> Tensor:
        """See Program."""
        return noise(batch, self.channels, self.size)


def read_dense(source: Path, encoder: Export) -> DenseExport | None:
    """The model of a run of segmentation or detection, with all of its heads that a program can hold.

    Args: source: as in read_export.  encoder: what that read of it: its metadata are the model's, too.
    Returns: None for other sources.
    """
    if is_segmentation(source):
        segmenter = load_segmenter(source, device="cpu")
        augment, names = segmenter.augment, segmenter.class_names
        facts = {
            "task": "segmentation",
            "classes": list(names),
            "palette": palette(names)[: len(names)].tolist(),
            "resize": {"shorter_px": augment.shorter_px, "longer_px": augment.longer_px},
            "windows": {"size": list(augment.size), "stride": segmenter.stride},
        }
        assert isinstance(segmenter.model, UPerNet)
        return DenseExport(
            kind="segmenter",
            model=PixelClasses(segmenter.model).eval(),
            outputs=("scores", "classes"),
            about=_about(encoder, segmenter.model, augment.size, facts),
            channels=segmenter.channels,
            size=augment.size,
        )
    if is_detection(source):
        finder = load_finder(source, device="cpu")
        names, size = finder.class_names, finder.augment.size
        facts = {
            "task": "detection, dense part",
            "classes": list(names),
            "category_ids": list(finder.category_ids),
            "strides": list(finder.model.strides),
            "detector": asdict(finder.model.config),
        }
        model = finder.model
        del model.roi_heads  # they look at regions, and are not in the program
        return DenseExport(
            kind="detector_dense",
            model=DensePart(model).eval(),
            outputs=(*(f"level{index}" for index in range(len(model.strides))), "objectness", "boxes"),
            about=_about(encoder, model, size, facts),
            channels=finder.channels,
            size=size,
            remark=", without the heads that look at regions",
        )
    return None


def _about(encoder: Export, model: nn.Module, size: tuple[int, int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's metadata with what the heads add."""
    about = encoder.metadata.to_json()
    about["preprocessing"] = {**about["preprocessing"], "image_size": list(size), "crop_pct": None}
    return {**about, "num_classes": len(facts["classes"]), "digest": digest_of(model.state_dict()), **facts}
