"""Models with their code, for any batch size: torch.export and ONNX.

The writers load what they wrote and compare it with our model; they return the difference, in words.
"""

from __future__ import annotations

import json
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixmae.convert.exported import Program, compare

ONNX_LIMIT_BYTES = 2_000_000_000
"""Largest size of the weights in one ONNX file (protobuf's limit is 2 GiB)."""


def write_pt2(item: Program, path: Path) -> str:
    """Write a program of torch.export.   Raises: ValueError if it gives other numbers than the model."""
    torch.export.save(_program(item), path, extra_files={"mixmae.json": json.dumps(item.about)})
    return compare(item, "torch.export", torch.export.load(path).module())


def write_onnx(item: Program, path: Path) -> str:
    """Write an ONNX file; needs the extra mixmae[export].   Raises: ValueError as write_pt2."""
    import onnxruntime

    with warnings.catch_warnings(), _plain_attention():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _program(item),
            input_names=["images"],
            output_names=list(item.outputs),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["mixmae"] = json.dumps(item.about)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return compare(
        item, "onnxruntime", lambda images: [*map(torch.from_numpy, session.run(None, {"images": images.numpy()}))]
    )


def check_onnx(item: Program) -> None:
    """Check that an ONNX file can be written.

    Raises: ValueError if the extra is not installed, or the weights are too large.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"onnx needs packages that are not installed ({error}): pip install 'mixmae[export]'"
        ) from error
    size = sum(value.numel() * value.element_size() for value in item.model.state_dict().values())
    if size > ONNX_LIMIT_BYTES:
        raise ValueError(f"these weights have {size / 1e9:.1f} GB, and an ONNX file holds 2 GB: export pt2 instead")


def _plain_attention() -> AbstractContextManager[None]:
    """No fused attention: its memory layout depends on the machine and would become part of the graph."""
    return sdpa_kernel(SDPBackend.MATH)


def _program(item: Program) -> torch.export.ExportedProgram:
    """The model as a graph, for any batch size."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad(), _plain_attention():
        return torch.export.export(item.model, (item.images(2),), dynamic_shapes=shapes)
