"""What a config of timm or Hugging Face beside a file of weights says of the images that they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of the filters, which Hugging Face writes."""


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """Read the fields of Preprocessing that a config in a folder gives; print where they come from.

    Returns: image_size, mean, std, interpolation and crop_pct; what the configs do not say is left out.
    Raises: ValueError if a config is damaged.
    """
    for name, fields_of in CONFIG_FILES.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = fields_of(content) if isinstance(content, Mapping) else {}
        except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{file}, beside the weights, is damaged ({error!r}): download it again, or move it away"
            ) from error
        if found:
            values = ", ".join(f"{name} {value}" for name, value in found.items())
            print(f"note: the preprocessing is that of {file}: {values}")
            return found
    return {}


def _of_timm(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of timm's config, whose fields were at the top in early versions; other programs' config.json says nothing."""
    config = content if "architecture" in content else {}
    config = config.get("pretrained_cfg") or config
    fields: dict[str, Any] = {}
    if config.get("input_size"):
        _, height, width = config["input_size"]
        fields["image_size"] = (int(height), int(width))
    fields |= {name: tuple(map(float, config[name])) for name in ("mean", "std") if config.get(name)}
    if config.get("interpolation"):
        fields["interpolation"] = str(config["interpolation"])
    if config.get("crop_pct"):
        fields["crop_pct"] = float(config["crop_pct"])
    return fields


def _of_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    crops = config.get("do_center_crop", True) and config.get("crop_size")
    if config.get("size"):
        size = _sides(config["size"])
        fields["image_size"] = _sides(config["crop_size"]) if crops else size
        fields["crop_pct"] = float(config.get("crop_pct") or min(fields["image_size"]) / min(size))
    if not config.get("do_normalize", True):
        fields |= {"mean": (0.0,), "std": (1.0,)}
    elif config.get("image_mean") is not None and config.get("image_std") is not None:
        # Pixels of 0..255 are multiplied by rescale_factor first, and ours are divided by 255.
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        scale = round(255 * factor, 9)
        for name in ("mean", "std"):
            values = config[f"image_{name}"]
            fields[name] = tuple(float(value) / scale for value in (values if isinstance(values, list) else [values]))
    if config.get("resample") in RESAMPLE:
        fields["interpolation"] = RESAMPLE[config["resample"]]
    return fields


def _sides(size: int | Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of Hugging Face's sizes: a number, a height and a width, or the shortest edge."""
    if isinstance(size, Mapping):
        return (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    return int(size), int(size)


CONFIG_FILES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "config.json": _of_timm,
    "preprocessor_config.json": _of_hugging_face,
}
"""Names of the configs, and what reads them; the first that says anything counts."""
