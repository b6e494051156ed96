"""Compiling what is trained with torch.compile."""

from __future__ import annotations

import re

import torch
from torch import nn

_BLOCK = re.compile(r"(.*\.)?blocks\.\d+")
KINDS = 64
"""Graphs that the code of a block may have: for each stage and part with such blocks, with gradients and without, with
a group map and without. torch's own limit is 8; beyond it, blocks run as they are written."""


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile a model in place, so that names in checkpoints stay as they are.

    On a GPU each block of the encoder and the decoder is compiled. Blocks of a stage share a graph, and compiling takes
    seconds; as one graph, a Swin-B takes minutes. What is between the blocks runs as it is written.

    On a CPU the model is one graph. By themselves, its blocks would be compiled anew with every draw: there, tokens are
    sorted window by window (layers.windows), unless all is one graph.
    """
    if device.type == "cpu":
        model.compile()
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    for name, module in model.named_modules():
        if _BLOCK.fullmatch(name):
            module.compile(dynamic=False)
