"""Export weights: a run's checkpoint, or a file of any known format, to the formats that other programs take.

    python pipelines/export.py SOURCE [--output FOLDER] [--formats encoder hub onnx pt2 official mmpretrain]

SOURCE is a checkpoint folder (runs/NAME/checkpoints/step_N), an encoder file, a hub folder, or official, mmpretrain,
timm, SimMIM, MAE or PVT weights (docs/weights.md).
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixmae
from mixmae.convert import (
    EncoderMetadata,
    Weights,
    build_model,
    describe,
    digest_of,
    encoder_state,
    first_conv,
    read_weights,
    save_tensors,
    to_mmpretrain,
    to_official,
    writing,
)
from mixmae.convert.files import NOT_STATED
from mixmae.encoders.build import config_to_json, size_name
from mixmae.flops import count_macs, count_parameters
from mixmae.tracking import RunRef, metric_history
from pipelines.console import fail

Format = Literal["encoder", "hub", "onnx", "pt2", "official", "mmpretrain"]

TOLERANCE = 1e-4
"""Largest difference of an exported model's output from ours, as a share of the largest value; float32 has 1e-6."""

ONNX_LIMIT_BYTES = 2_000_000_000
"""What one ONNX file can hold."""

CURVES = {"train/loss": "training", "heldout/loss": "held out"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: what to export, where to, and how."""

    source: tyro.conf.Positional[Path]
    """A run's checkpoint folder, or weights of any known format."""
    output: Path | None = None
    """Folder to write to. Default: exports/NAME, after the run or the file."""
    formats: Annotated[tuple[Format, ...], tyro.conf.arg(metavar="FORMAT ...")] = ("encoder",)
    """encoder: one safetensors file that says all of itself. hub: a Hugging Face Hub folder, which timm opens. onnx,
    pt2: the model with its code, any batch size. official, mmpretrain: their names, for their programs."""
    data_licence: str = NOT_STATED
    """What the licence of the training data says of such weights; it is written into the files."""
    mean: tuple[float, ...] | None = None
    """Mean that pixels (0..1) are normalised with. Default: the run's; ImageNet's for files that do not say it."""
    std: tuple[float, ...] | None = None
    """Spread that pixels (0..1) are normalised with. Default: as for mean."""
    overwrite: bool = False
    """Replace what is there."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported, in the forms that the formats need."""

    weights: Weights
    """All of it, a decoder included."""
    model: nn.Module
    """The encoder, or the classifier if there is a head, in evaluation mode."""
    state: dict[str, Tensor]
    """The model's weights in our names."""
    metadata: EncoderMetadata
    run_folder: Path | None
    """The folder of the run that a checkpoint is of."""

    @property
    def kind(self) -> str:
        return "encoder" if self.metadata.num_classes is None else "classifier"

    @property
    def official(self) -> dict[str, Tensor]:
        """The weights that the official classes have: those of the model, and a decoder of MixMAE's kind."""
        decodes = "decoder.embed.weight" in self.weights.state  # SimMIM's does not
        kept = {name: value for name, value in self.weights.state.items() if decodes and name.startswith("decoder.")}
        return self.state | kept

    def images(self, batch: int) -> Tensor:
        """Noise to compare outputs on, (batch, C, H, W)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(
            batch, self.metadata.encoder.in_channels, *self.metadata.preprocessing.image_size, generator=generator
        )


def export(arguments: Arguments) -> int:
    """Write the formats asked for.   Returns: the process's exit status.   Raises: ValueError, FileNotFoundError."""
    item = read(arguments)
    run = item.run_folder
    folder = arguments.output or Path("exports") / (run.name if run else arguments.source.resolve().stem)
    targets = {name: folder / FILES[name].format(kind=item.kind) for name in dict.fromkeys(arguments.formats)}
    there = [str(path) for path in targets.values() if path.exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{', '.join(there)} there already: choose another --output, or pass --overwrite")
    for name in targets:
        CHECKS.get(name, lambda _: None)(item)  # before anything is written
    print(f"{arguments.source}: {describe(item.state)}, {count_parameters(item.model) / 1e6:.1f} M parameters")
    for name, path in targets.items():
        with writing(path, overwrite=arguments.overwrite) as partial:
            note = WRITERS[name](item, partial)
        print(f"{name:<10} {path}  {_megabytes(path)}{note}")
    return 0


def read(arguments: Arguments) -> Export:
    """Read what is to be exported and build its model."""
    weights = read_weights(arguments.source)
    model, metadata = build_model(weights, arguments.source)
    preprocessing = metadata.preprocessing
    for name in ("mean", "std"):
        values = getattr(arguments, name) or getattr(preprocessing, name)
        if len(values) != metadata.encoder.in_channels:
            raise ValueError(f"--{name} needs a value for each of the {metadata.encoder.in_channels} channels")
        preprocessing = replace(preprocessing, **{name: values})
    state = encoder_state(model)[1]
    licence = arguments.data_licence if arguments.data_licence != NOT_STATED else metadata.data_licence
    metadata = replace(metadata, preprocessing=preprocessing, data_licence=licence, digest=digest_of(state))
    parents = arguments.source.resolve().parents if arguments.source.is_dir() else ()
    run = next((folder for folder in parents if (folder / "run.json").is_file()), None)
    return Export(weights=weights, model=model, state=state, metadata=metadata, run_folder=run)


def write_encoder(item: Export, path: Path) -> str:
    save_tensors(path, item.state, item.metadata)
    return f", sha256 of the weights {item.metadata.digest[:12]}..."


def write_official(item: Export, path: Path) -> str:
    # A tensor of a file's own, whatever it was a view of: torch.save would keep the whole.
    torch.save({"model": {name: value.clone() for name, value in to_official(item.official).items()}}, path)
    return ""


def write_mmpretrain(item: Export, path: Path) -> str:
    content = {name: value.clone() for name, value in to_mmpretrain(item.official).items()}
    torch.save({"meta": {"mixmae_version": mixmae.__version__}, "state_dict": content}, path)
    return ""


def check_paper_swin(item: Export) -> None:
    """The official classes and mmpretrain's are the paper's Swin alone."""
    config = config_to_json(item.metadata.encoder)
    if config["type"] != "SwinConfig" or config.get("shift") or "encoder.pos_embed" not in item.state:
        raise ValueError(
            f"the official classes and mmpretrain's are the paper's Swin, and this is {describe(item.state)}: export "
            "it as encoder, hub, onnx or pt2"
        )


def write_pt2(item: Export, path: Path) -> str:
    torch.export.save(_program(item), path, extra_files={"mixmae.json": json.dumps(item.metadata.to_json())})
    return compare(item, "torch.export", torch.export.load(path).module())


def write_onnx(item: Export, path: Path) -> str:
    import onnxruntime

    with warnings.catch_warnings(), _plain_attention():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _program(item),
            input_names=["images"],
            output_names=["tokens" if item.metadata.num_classes is None else "logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["mixmae"] = json.dumps(item.metadata.to_json())
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return compare(
        item, "onnxruntime", lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    )


def check_onnx(item: Export) -> None:
    """Raise ValueError if the extra is not installed, or the weights are too large."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"onnx needs packages that are not installed ({error}): pip install 'mixmae[export]'"
        ) from error
    size = sum(value.numel() * value.element_size() for value in item.state.values())
    if size > ONNX_LIMIT_BYTES:
        raise ValueError(f"these weights have {size / 1e9:.1f} GB, and an ONNX file holds 2 GB: export pt2 instead")


def _plain_attention() -> AbstractContextManager[None]:
    """No fused attention, whose layout of memory differs from machine to machine and ends up in the graph."""
    return sdpa_kernel(SDPBackend.MATH)


def _program(item: Export) -> torch.export.ExportedProgram:
    """The model as a graph, for any batch size."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad(), _plain_attention():
        return torch.export.export(item.model, (item.images(2),), dynamic_shapes=shapes)


def compare(item: Export, name: str, run: Callable[[Tensor], Tensor]) -> str:
    """Run an exported model beside ours, on other batches than it was made with.

    Returns: how far off it is, in words.   Raises: ValueError if that is too far.
    """
    worst = 0.0
    for batch in (1, 3):
        images = item.images(batch)
        with torch.no_grad():
            expected = item.model(images)
            difference = ((run(images) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name} gives other numbers than the model ({difference:.1e} of the largest): not written"
            )
        worst = max(worst, difference)
    return f", {name} differs by {worst:.0e} of the largest value"


def write_hub(item: Export, path: Path) -> str:
    """A folder that the Hub shows and timm opens (local-dir:, hf-hub:), after `import mixmae.timm_models`."""
    path.mkdir()
    save_tensors(path / "model.safetensors", item.state, item.metadata)
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
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "num_classes": num_classes,
            "first_conv": first_conv(encoder),
            "classifier": "head",
        },
        "mixmae": item.metadata.to_json(),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pictures = ""
    if item.run_folder is not None:
        panel = max((item.run_folder / "panels").glob("step_*.png"), default=None)
        if panel is not None:
            (path / "panel.png").write_bytes(panel.read_bytes())
            pictures += "\n![reconstructions of held-out images](panel.png)\n"
        if draw_curve(item.run_folder, path / "loss.png"):
            pictures += "\n![loss by step](loss.png)\n"
    (path / "README.md").write_text(model_card(item, pictures))
    return ""


def draw_curve(run_folder: Path, path: Path) -> bool:
    """Draw the run's losses by step.   Returns: False, and no picture, if MLflow's store does not have them."""
    content = json.loads((run_folder / "run.json").read_text())
    if "mlflow" not in content:
        return False
    curves = {label: metric_history(RunRef(**content["mlflow"]), key) for key, label in CURVES.items()}
    if not any(curves.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else "")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def model_card(item: Export, pictures: str) -> str:
    """The README.md of a hub folder: facts of the weights, and how to use them."""
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


def _megabytes(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


FILES: dict[Format, str] = {
    "encoder": "{kind}.safetensors",
    "hub": "hub",
    "onnx": "{kind}.onnx",
    "pt2": "{kind}.pt2",
    "official": "official.pth",
    "mmpretrain": "mmpretrain.pth",
}
WRITERS: dict[Format, Callable[[Export, Path], str]] = {
    "encoder": write_encoder,
    "hub": write_hub,
    "onnx": write_onnx,
    "pt2": write_pt2,
    "official": write_official,
    "mmpretrain": write_mmpretrain,
}
CHECKS: dict[Format, Callable[[Export], None]] = {
    "onnx": check_onnx,
    "official": check_paper_swin,
    "mmpretrain": check_paper_swin,
}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = tyro.cli(Arguments, args=argv, prog="export.py", description=__doc__)
    try:
        return export(arguments)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
