"""Folders for the Hugging Face Hub: weights, config, and a model card with the run's last panel and loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixmae
from mixmae.convert.architecture import describe
from mixmae.convert.exported import Export
from mixmae.convert.metadata import METADATA_KEY, NOT_STATED
from mixmae.convert.models import encoder_state, first_conv
from mixmae.convert.write import save_tensors
from mixmae.encoders.build import config_to_json, size_name
from mixmae.flops import count_macs, count_parameters
from mixmae.tracking import RunRef, metric_history, points
from mixmae.training.checkpoint import MODEL_FILE
from mixmae.training.run_folder import RUN_FILE, RunFolder

CURVES = {"train/loss": "training", "heldout/loss": "held out"}
"""Metrics in the drawing of the losses, and their labels."""


def write_hub(item: Export, path: Path) -> str:
    """Write a folder that the Hub shows and timm opens (local-dir:, hf-hub:) after `import mixmae.timm_models`.

    Args: item: what is exported.  path: the folder, which does not exist yet.
    Returns: a note for the line that export.py prints: nothing.
    """
    path.mkdir()
    save_tensors(path / MODEL_FILE, item.state, item.metadata)
    preprocessing = item.metadata.preprocessing
    height, width = preprocessing.image_size
    num_classes = item.metadata.num_classes or 0
    encoder = encoder_state(item.model)[0]
    config = {
        "architecture": "mixmae_encoder",
        "num_classes": num_classes,
        "num_features": encoder.channels[-1],
        "model_args": {"encoder": config_to_json(item.metadata.encoder), "img_size": [height, width]},
        "pretrained_cfg": {
            "input_size": [item.metadata.encoder.in_channels, height, width],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            **({} if preprocessing.crop_pct is None else {"crop_pct": preprocessing.crop_pct}),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "num_classes": num_classes,
            "first_conv": first_conv(encoder),
            "classifier": "head",
        },
        METADATA_KEY: item.metadata.to_json(),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pictures = ""
    if item.run_folder is not None:
        panel = RunFolder(item.run_folder).last_panel()
        if panel is not None:
            (path / "panel.png").write_bytes(panel.read_bytes())
            pictures += "\n![reconstructions of held-out images](panel.png)\n"
        if draw_curve(item.run_folder, path / "loss.png"):
            pictures += "\n![loss by step](loss.png)\n"
    (path / "README.md").write_text(model_card(item, pictures), encoding="utf-8")
    return ""


def draw_curve(run_folder: Path, path: Path) -> bool:
    """Draw the losses of a run by step, as a PNG.   Returns: False, with nothing drawn, if there are none."""
    curves = {label: points(run_folder, key) for key, label in CURVES.items()}
    content = json.loads((run_folder / RUN_FILE).read_text(encoding="utf-8"))
    if not any(curves.values()) and "mlflow" in content:  # a run that is older than journals
        curves = {label: metric_history(RunRef(**content["mlflow"]), key) for key, label in CURVES.items()}
    if not any(curves.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, curve in curves.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), label=label, marker="." if len(curve) < 20 else "")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def model_card(item: Export, pictures: str) -> str:
    """The README.md of a hub folder: facts about the weights, and how to use them.

    Args: item: what is exported.  pictures: Markdown of the panel and the curve, or nothing.
    """
    metadata, source = item.metadata, item.metadata.source
    height, width = metadata.preprocessing.image_size
    in_channels = metadata.encoder.in_channels
    macs = count_macs(item.model, (height, width), in_channels=in_channels).total
    facts: dict[str, Any] = {
        "architecture": f"{describe(item.state)}; {count_parameters(item.model) / 1e6:.1f} M parameters, "
        f"{macs / 1e9:.2f} GMACs",
        "classes": metadata.num_classes or "none: features",
        "input": f"{in_channels} x {height} x {width}, resized {metadata.preprocessing.interpolation}",
        "mean, std": f"{metadata.preprocessing.mean}, {metadata.preprocessing.std}",
        "made from": f"{source.get('name', NOT_STATED)} ({source.get('format', NOT_STATED)})",
        "run": source.get("run_id", NOT_STATED),
        "step": source.get("position", {}).get("step", NOT_STATED),
        "training data": source.get("data", {}).get("name", NOT_STATED),
        "licence of the data": metadata.data_licence,
        "sha256 of the weights": metadata.digest,
        "versions": ", ".join(f"{name} {number}" for name, number in source.get("versions", {}).items())
        or f"mixmae {mixmae.__version__} (export)",
    }
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items())
    title = size_name(metadata.encoder) or type(metadata.encoder).__name__.removesuffix("Config").lower()
    head = "---\nlibrary_name: timm\ntags:\n- image-classification\n" if metadata.num_classes else (
        "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n"
    )  # fmt: skip
    return f"""{head}- mixmae
---

# {title}, {"a classifier" if metadata.num_classes else "an encoder"} of MixMAE

| | |
| --- | --- |
{rows}
{pictures}
```python
import timm
import mixmae.timm_models

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)  # or "hf-hub:OWNER/NAME"
```

`mixmae.convert.load_encoder("PATH_OF_THIS_FOLDER")` gives the encoder itself, which takes group maps too.
"""
