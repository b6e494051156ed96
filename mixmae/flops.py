"""Parameters and multiply-accumulates of a model, counted from its modules.

Conventions, found by matching the figures of the official classes to all their printed digits:
- A parameter count includes the fixed position tables, which the official classes keep as parameters without gradient.
- A MAC is one multiply-accumulate; a matrix product of (a, b) by (b, c) is a*b*c of them. Linear layers, convolutions
  and both products of attention count (all pairs of a window, blocked ones too); biases, additions, activations, the
  softmax and pooling do not. A layer norm counts 5 per element, as in fvcore, whose counts the official figures are.
- fvcore did not see the products inside the official DECODER's attention, which is one fused function there. total
  includes them; official_macs leaves them out, to compare with the official 19.002 G of pretraining.
What papers call FLOPs is MACs here (the paper's "16.3 G FLOPs" of Swin-B/W14 are 16.35 GMACs).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FIXED_TABLE = "pos_embed"
NORM_MACS_PER_ELEMENT = 5
DECODER = "decoder"

_KINDS = {
    "mm": "linear",
    "addmm": "linear",
    "bmm": "attention",
    "baddbmm": "attention",
    "convolution": "convolution",
    "native_layer_norm": "norm",
}
"""Which field of Macs an operation counts in; every kind of fused attention is attention."""


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates by what does them."""

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
    """Count the numbers in a model's parameters and fixed position tables. Models on the meta device count too."""
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
    """Count the MACs of a model's forward, a single image.

    The model runs on the meta device (a copy of it does, unless it is there already), so nothing is computed.

    Args:
        model: called as model(images, **inputs).
        image_size: side, or height and width, in pixels.
        in_channels: channels of the images.
        num_images: images in the batch it is called with; the result is divided by it. MixMAE needs K or a multiple,
            and then the count is that of one mix: one encoder run, and one decoder run for each of its K images.
        part: dotted name of a submodule to count alone, for example "decoder"; default the whole model.
        inputs: further arguments of the call, such as generator=torch.Generator() for MixMAE.
    Returns: the count.
    Raises: ValueError if there is no such part.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if part and part not in dict(model.named_modules()):
        raise ValueError(f"the model has no part named {part!r}")
    if any(tensor.device.type != "meta" for tensor in model.state_dict().values()):
        model = copy.deepcopy(model).to("meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: _norm_flops})
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
    unseen = count_macs(model, image_size, part=DECODER, **options).attention if hasattr(model, DECODER) else 0
    return count_macs(model, image_size, **options).total - unseen


def _norm_flops(input_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count twice the MACs of a layer norm, since the counter counts two FLOPs a MAC."""
    return 2 * NORM_MACS_PER_ELEMENT * input_shape.numel()
