"""Parameters and multiply-accumulates of a model, counted from its modules.

    python -m mixmae.flops [--json]

prints those of the paper's encoders beside its figures, and the cost of pretraining per image under each method.

Conventions, found by matching the figures of the official classes to all their printed digits:
- A parameter count includes the fixed position tables, which the official classes keep as parameters without gradient.
- A MAC is one multiply-accumulate; a matrix product of (a, b) by (b, c) is a*b*c of them. Linear layers, convolutions
  and both products of attention count (all pairs of a window, also those that may not attend); biases, additions,
  activations, the softmax and pooling do not. A layer norm counts 5 per element, as in fvcore, with which the official
  figures were counted; group norms (ResNetV2) do not count.
- A group map on the meta device changes no count: pairs of different groups count, and so does each offset of a kernel.
  But a dense convolution is a matrix product there, which counts as linear or attention. MixMAE's own maps are known,
  so that what a Swin and the decoder leave out is not counted: other groups where a window is the grid, visible tokens
  in the last MLP and after it. official_macs has all of it, as the official classes compute it.
- The official DECODER's attention is one fused function, whose products fvcore did not count. total includes them;
  official_macs leaves them out, to compare with the official 19.002 G of pretraining.
What papers call FLOPs is MACs here (the paper's "16.3 G FLOPs" of Swin-B/W14 are 16.35 GMACs).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixmae.encoders.build import SIZES, build_encoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.methods.build import MethodConfig, build_method
from mixmae.methods.mae import MAEConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from mixmae.patches import image_sides

FIXED_TABLE = "pos_embed"
NORM_MACS_PER_ELEMENT = 5
DECODER = "decoder"

_KINDS = {
    "mm": "linear",
    "addmm": "linear",
    "bmm": "attention",
    "baddbmm": "attention",
    "convolution": "convolution",
    "addcmul": "convolution",
    "native_layer_norm": "norm",
}
"""Which field of Macs an operation counts in; every kind of fused attention is attention. addcmul is what a depthwise
convolution does under a group map, once per offset of its kernel."""


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates by the kind of operation."""

    linear: int = 0
    convolution: int = 0
    attention: int = 0
    """The products of queries with keys and of weights with values."""
    norm: int = 0
    """Layer norms, at 5 per element."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.convolution + self.attention + self.norm


def count_parameters(model: nn.Module) -> int:
    """Count the elements of a model's parameters and fixed position tables, on any device, meta included."""
    tables = (buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == FIXED_TABLE)
    return sum(p.numel() for p in model.parameters()) + sum(table.numel() for table in tables)


def count_macs(
    model: nn.Module,
    image_size: int | tuple[int, int],
    *,
    in_channels: int = 3,
    num_images: int = 1,
    part: str = "",
    **inputs: Any,
) -> Macs:
    """Count the MACs of a model's forward, per image.

    The model, or a copy of it, runs on the meta device, so nothing is computed.

    Args:
        model: called as model(images, **inputs).
        image_size: side, or height and width, in pixels.
        in_channels: channels of the images.
        num_images: images in the batch; the result is divided by it. MixMAE needs a multiple of K; the count is then
            that of one mix: one encoder run, and one decoder run for each of its K images.
        part: dotted name of a submodule to count alone, for example "decoder"; default the whole model.
        inputs: further arguments of the call, such as generator=torch.Generator() for MixMAE.
    Returns: the count.
    Raises: ValueError if there is no such part.
    """
    height, width = image_sides(image_size)
    if part and part not in dict(model.named_modules()):
        raise ValueError(f"the model has no part named {part!r}")
    if any(tensor.device.type != "meta" for tensor in model.state_dict().values()):
        model = copy.deepcopy(model).to("meta")
    ours = {torch.ops.aten.native_layer_norm: _norm_flops, torch.ops.aten.addcmul: _addcmul_flops}
    counter = FlopCounterMode(display=False, custom_mapping=ours)
    with counter, torch.no_grad():
        model(torch.empty(num_images, in_channels, height, width, device="meta"), **inputs)
    root = type(model).__name__
    counts: Mapping[Any, int] = counter.get_flop_counts()[f"{root}.{part}" if part else root]
    totals: dict[str, int] = {}
    for operation, flops in counts.items():
        name = operation.__name__.split(".")[0]
        kind = "attention" if "attention" in name else _KINDS[name]
        totals[kind] = totals.get(kind, 0) + flops
    return Macs(**{kind: flops // (2 * num_images) for kind, flops in totals.items()})


def official_macs(model: nn.Module, image_size: int | tuple[int, int], **options: Any) -> int:
    """Count MACs as the official figures do: all but the products inside the decoder's attention.

    Args: as in count_macs.
    Source: counts of the official classes: finetune base 16.353 G, pretraining base 19.002 G (K = 2).
    """
    if not hasattr(model, DECODER):
        return count_macs(model, image_size, **options).total
    # Ours attends to no pair of two groups and predicts no visible token. The official encoder looks at all pairs, as
    # without a map, and its decoder predicts all tokens, as ours does once more for a picture.
    drawn = count_macs(model, image_size, part=DECODER, with_pictures=True, **options)
    loss = count_macs(model, image_size, part=DECODER, **options)
    return (
        count_macs(model.get_submodule("encoder"), image_size).total
        + drawn.total
        - loss.total
        - (drawn.attention - loss.attention)
    )


def _norm_flops(input_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count twice the MACs of a layer norm, since the counter counts two FLOPs per MAC."""
    return 2 * NORM_MACS_PER_ELEMENT * input_shape.numel()


def _addcmul_flops(*args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    """Count one MAC per element."""
    return 2 * out_shape.numel()


IMAGE_PX = 224
NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class PaperEncoder:
    """An encoder of the paper, and what the paper prints of it."""

    name: str
    """The paper's name."""
    size: str
    """Ours, a key of encoders.build.SIZES."""
    where: str
    """The tables that it is in, or else the section."""
    paper_params_m: float | None = None
    """Parameters in millions; None if the paper prints none."""
    paper_gmacs: float | None = None
    """Its "FLOPs (G)", which are MACs."""
    why: str = ""
    """Why ours differ, where they do by more than 1 %."""


PAPER_ENCODERS = (
    PaperEncoder(name="Swin-B", size="swin_base_w7", where="2, 3", paper_params_m=88, paper_gmacs=15.6),
    PaperEncoder(name="Swin-B/W14", size="swin_base", where="2, 5", paper_params_m=88, paper_gmacs=16.3),
    PaperEncoder(
        name="Swin-L",
        size="swin_large",
        where="3, 5",
        paper_params_m=235,
        paper_gmacs=35.8,
        why="the released Swin-L, with windows of 14, has 197 M too; the paper's 35.8 G are that model's",
    ),
    PaperEncoder(
        name="Swin-H",
        size="swin_huge",
        where="section 5.1",
        paper_params_m=600,
        why='"600M" is a round number; the official class has 659 M too',
    ),
    PaperEncoder(name="PVT-L", size="pvt_large", where="3"),
    PaperEncoder(name="Twins-SVT-L", size="twins_svt_large", where="3"),
    PaperEncoder(name="ViT-B", size="vit_base", where="2, 5, 17", paper_params_m=86, paper_gmacs=17.5),
    PaperEncoder(name="ViT-L", size="vit_large", where="5", paper_params_m=304, paper_gmacs=61.3),
    PaperEncoder(name="Res50x3", size="resnetv2_50x3", where="19"),
    PaperEncoder(name="Res101x3", size="resnetv2_101x3", where="19"),
)

METHODS: dict[str, MethodConfig] = {
    **{
        f"MixMAE, K = {num_images}, pairing {pairing}": MixMAEConfig(num_images=num_images, pairing=pairing)
        for num_images in (2, 4)
        for pairing in ("all", "once")
    },
    "SimMIM": SimMIMConfig(),
    "MAE": MAEConfig(),
}
PRETRAINED = {"Swin-B/W14": "swin_base", "ViT-B": "vit_base"}


def encoder_figures() -> list[dict[str, Any]]:
    """Count the paper's encoders at 224 px with a head of 1000 classes; ratios are ours / paper."""
    rows = []
    for paper in PAPER_ENCODERS:
        with torch.device("meta"):
            model = ImageClassifier(build_encoder(SIZES[paper.size]()), NUM_CLASSES)
        parameters, macs = count_parameters(model), count_macs(model, IMAGE_PX).total
        rows.append(
            {
                **asdict(paper),
                "parameters": parameters,
                "params_ratio": parameters / (paper.paper_params_m * 1e6) if paper.paper_params_m else None,
                "macs": macs,
                "macs_ratio": macs / (paper.paper_gmacs * 1e9) if paper.paper_gmacs else None,
            }
        )
    return rows


def pretraining_figures() -> list[dict[str, Any]]:
    """Count the cost of one forward per image of the batch, at 224 px, for each method that fits the encoder."""
    rows = []
    for name, size in PRETRAINED.items():
        for method, config in METHODS.items():
            if isinstance(config, MAEConfig) and not size.startswith("vit"):
                continue  # a pyramid cannot run on a part of its tokens
            with torch.device("meta"):
                model = build_method(build_encoder(SIZES[size]()), config)
            # A batch of 4 is a multiple of every K. MAE calls parts of its encoder, so that is counted as the rest.
            options: dict[str, Any] = {"num_images": 4, "generator": torch.Generator()}
            macs = count_macs(model, IMAGE_PX, **options).total
            decoder = count_macs(model, IMAGE_PX, part=DECODER, **options).total
            rows.append(
                {
                    "encoder": name,
                    "method": method,
                    "encoder_macs": macs - decoder,
                    "decoder_macs": decoder,
                    "macs": macs,
                }
            )
    return rows


def align(rows: list[list[str]]) -> str:
    """Lay rows out in columns: words aligned left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )


def report(figures: Mapping[str, Any]) -> str:
    """Write the results of encoder_figures and pretraining_figures as text."""
    encoders = [["encoder", "table", "params M", "paper", "ratio", "GMACs", "paper", "ratio", "why"]]
    for row in figures["encoders"]:
        cells = [row["name"], row["where"]]
        for ours, paper, ratio, unit in (
            ("parameters", "paper_params_m", "params_ratio", 1e6),
            ("macs", "paper_gmacs", "macs_ratio", 1e9),
        ):
            printed = ["-", "-"] if row[paper] is None else [f"{row[paper]:g}", f"{row[ratio]:.3f}"]
            cells += [f"{row[ours] / unit:.2f}", *printed]
        encoders.append([*cells, row["why"]])
    pretraining = [["encoder", "method", "encoder G", "decoder G", "total G"]] + [
        [row["encoder"], row["method"], *(f"{row[key] / 1e9:.2f}" for key in ("encoder_macs", "decoder_macs", "macs"))]
        for row in figures["pretraining"]
    ]
    return f"""The paper's encoders at {IMAGE_PX} px, with a head of {NUM_CLASSES} classes.
GMACs are the paper's FLOPs (G); ratio is ours / paper.

{align(encoders)}

One forward of pretraining, in GMACs per image of the batch, at {IMAGE_PX} px.
pairing all: as many mixes as images; once: each image in one mix. ViT has no class token; its mask cells are of 32 px
under MixMAE and SimMIM.

{align(pretraining)}"""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mixmae.flops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    as_json = parser.parse_args(argv).json
    figures = {"encoders": encoder_figures(), "pretraining": pretraining_figures()}
    print(json.dumps(figures, indent=2) if as_json else report(figures))


if __name__ == "__main__":
    main()
