"""Export the weights of a run, or of a file in any known format, to the formats that other programs read.

    python pipelines/export.py SOURCE [--output FOLDER] [--formats encoder hub onnx pt2 official mmpretrain]

SOURCE is the folder of a run or a sweep (its best weights, else its last checkpoint), a checkpoint's folder, an encoder
file, a hub folder, or official, mmpretrain, timm, SimMIM, MAE or PVT weights (docs/weights.md).

Of a run of segmentation, onnx and pt2 are the whole model; of a run of detection, its dense part. The other formats are
of its encoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import mixmae
from mixmae.convert import describe, save_tensors, to_mmpretrain, to_official
from mixmae.convert.exported import Export, read_export
from mixmae.convert.hub import write_hub
from mixmae.convert.metadata import NOT_STATED
from mixmae.convert.programs import check_onnx, write_onnx, write_pt2
from mixmae.encoders.build import config_to_json
from mixmae.flops import count_parameters
from mixmae.jobs.exporting import DenseExport, read_dense
from mixmae.training.run_folder import run_around, stem_of
from mixmae.writing import writing
from pipelines.command import command

Format = Literal["encoder", "hub", "onnx", "pt2", "official", "mmpretrain"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: what to export, where to, and how."""

    source: tyro.conf.Positional[Path]
    """Folder of a run, a sweep or a checkpoint, or weights in any known format."""
    output: Path | None = None
    """Folder to write to. Default: exports/NAME, with the name of the run, the sweep or the file."""
    formats: Annotated[tuple[Format, ...], tyro.conf.arg(metavar="FORMAT ...")] = ("encoder",)
    """encoder: one safetensors file with all that is needed to use it. hub: a Hugging Face Hub folder, which timm
    opens. onnx, pt2: the model with its code, for any batch size. official, mmpretrain: files for their programs."""
    weights_key: str | None = None
    """Which weights, of a file with several sets, such as model_ema or teacher. Default: the trained ones."""
    data_licence: str = NOT_STATED
    """How the licence of the training data restricts such weights; written into the files."""
    mean: tuple[float, ...] | None = None
    """Mean that pixels (0..1) are normalised with. Default: the run's; for files without it that of a config beside
    them, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation that pixels (0..1) are normalised with. Default: as for mean."""
    overwrite: bool = False
    """Replace files that exist."""


def export(arguments: Arguments) -> int:
    """Write the requested formats.

    Returns: the process's exit status.
    Raises: ValueError if the weights cannot be read or a format cannot hold them; FileNotFoundError.
    """
    item = read_export(
        arguments.source,
        mean=arguments.mean,
        std=arguments.std,
        data_licence=arguments.data_licence,
        key=arguments.weights_key,
    )
    run = run_around(arguments.source) if arguments.source.is_dir() else None
    folder = arguments.output or Path("exports") / (run.name if run else stem_of(arguments.source))
    dense = read_dense(arguments.source, item) if PROGRAMS.keys() & set(arguments.formats) else None
    program = dense or item
    kinds = {name: program.kind if name in PROGRAMS else item.kind for name in arguments.formats}
    targets = {name: folder / FILES[name].format(kind=kind) for name, kind in kinds.items()}
    there = [str(path) for path in targets.values() if path.exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{', '.join(there)} there already: choose another --output, or pass --overwrite")
    for name in targets:  # before anything is written
        if name == "onnx":
            check_onnx(program)
        elif name in ("official", "mmpretrain"):
            check_paper_swin(item)
    print(f"{arguments.source}: {describe(item.state)}, {count_parameters(item.model) / 1e6:.1f} M parameters")
    for name, path in targets.items():
        with writing(path, overwrite=arguments.overwrite) as partial:
            note = PROGRAMS[name](program, partial) if name in PROGRAMS else WRITERS[name](item, partial)
        remark = dense.remark if dense and name in PROGRAMS else ""
        print(f"{name:<10} {path}  {_megabytes(path)}{note}{remark}")
    return 0


def write_encoder(item: Export, path: Path) -> str:
    """Write an encoder file.   Returns: a note for the line that is printed, as all writers do."""
    save_tensors(path, item.state, item.metadata)
    return f", sha256 of the weights {item.metadata.digest[:12]}..."


def write_official(item: Export, path: Path) -> str:
    """Write a checkpoint of the official MixMIM code."""
    # Cloned, because torch.save stores the whole tensor that a view is part of.
    torch.save({"model": {name: value.clone() for name, value in to_official(item.official).items()}}, path)
    return ""


def write_mmpretrain(item: Export, path: Path) -> str:
    """Write a checkpoint of mmpretrain's MixMIM."""
    content = {name: value.clone() for name, value in to_mmpretrain(item.official).items()}
    torch.save({"meta": {"mixmae_version": mixmae.__version__}, "state_dict": content}, path)
    return ""


def check_paper_swin(item: Export) -> None:
    """Check that the encoder is the paper's Swin, the only one of the official code and of mmpretrain.

    Raises: ValueError if it is another one.
    """
    config = config_to_json(item.metadata.encoder)
    if config["type"] != "SwinConfig" or config.get("shift") or "encoder.pos_embed" not in item.state:
        raise ValueError(
            f"the official classes and mmpretrain's are the paper's Swin, and this is {describe(item.state)}: export "
            "it as encoder, hub, onnx or pt2"
        )


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
    "official": write_official,
    "mmpretrain": write_mmpretrain,
}
PROGRAMS: dict[Format, Callable[[Export | DenseExport, Path], str]] = {"onnx": write_onnx, "pt2": write_pt2}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(export, Arguments, argv, program="export.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
