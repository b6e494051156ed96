"""Loading weights into models: tables are resized to the model's input, a report is printed, poor matches are refused.

Legend: L tokens, C channels, N heads, H W a grid of tokens, w the side of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.convert.architecture import BIAS_TABLE, StateDict, describe, window_size
from mixmae.convert.read import Weights, read_weights
from mixmae.layers.positions import resize_positions

MIN_MATCHED = 0.95
"""Smallest share of a model's tensors that must be loaded."""

ENCODER, DECODER = "encoder.", "decoder."


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Result of loading weights into a model: names of tensors."""

    matched: tuple[str, ...]
    """Loaded unchanged."""
    missing: tuple[str, ...]
    """In the model, not in the weights: left unchanged."""
    unexpected: tuple[str, ...]
    """In the weights, not in the model: ignored."""
    mismatched: tuple[str, ...]
    """In both, with different shapes: the model's are left unchanged."""
    resized: tuple[str, ...] = ()
    """Tables of positions, loaded after resizing to the model's input size and windows."""

    @property
    def matched_share(self) -> float:
        """Share of the model's tensors that were loaded, in [0, 1]."""
        loaded = len(self.matched) + len(self.resized)
        return loaded / max(1, loaded + len(self.missing) + len(self.mismatched))

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched ({self.matched_share:.1%} with resized ones)"]
        for label in ("missing", "unexpected", "mismatched", "resized"):
            names = getattr(self, label)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {label}" + (f" ({shown})" if names else ""))
        return ", ".join(parts)


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, made_for: tuple[int, int] | None = None
) -> LoadReport:
    """Load the weights that fit a model, and report the others.

    Args: as in fit_weights; the model is changed in place.
    Returns: the report. A poor match is not refused (load_checked does that).
    """
    fitting, report = fit_weights(model, state, made_for=made_for)
    model.load_state_dict(fitting, strict=False)
    return report


def fit_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    made_for: tuple[int, int] | None = None,
) -> tuple[StateDict, LoadReport]:
    """Find the weights that fit a model, with tables of positions resized to its own; the model is not changed.

    Args:
        model: in our names.
        state: in our names, from from_official or another from_X.
        made_for: (H, W) in pixels, the input size of the position tables in `state`; default a square.
    Returns: the weights to load, and the report of loading them.
    """
    own = model.state_dict()
    matched = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    resized = {}
    for name, value in state.items():
        if name in own and name not in matched:
            table = _resize(model, name, value, own[name], made_for)
            if table is not None:
                resized[name] = table
    report = LoadReport(
        matched=tuple(matched),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(name for name in state if name in own and name not in matched | resized),
        resized=tuple(resized),
    )
    return matched | resized, report


def load_pretrained(
    model: nn.Module, path: Path | str, *, allow_mismatch: bool = False, key: str | None = None
) -> LoadReport:
    """Load weights in any known format into a model, print the report, and refuse a poor match.

    Args:
        model: an encoder, or a model with its encoder under `encoder`; changed in place.
        path, key: as in read_weights.
        allow_mismatch: load what fits, without refusing a poor match.
    Returns: the report, whose names are those of a model with its encoder under `encoder`.
    Raises: ValueError, before anything is changed, if less than MIN_MATCHED of the model's tensors would be loaded, a
        tensor of the encoder has another shape, or there are no weights for the model's decoder; and as read_weights.
    """
    return load_checked(model, read_weights(path, key=key), path, allow_mismatch=allow_mismatch)


def load_checked(model: nn.Module, weights: Weights, path: Path | str, *, allow_mismatch: bool = False) -> LoadReport:
    """Load weights that are already read; otherwise as load_pretrained. The path is for messages."""
    if not hasattr(model, "encoder"):
        holder = nn.Module()
        holder.encoder = model
        model = holder
    made_for = None if weights.metadata is None else weights.metadata.encoder.image_sides
    fitting, report = fit_weights(model, weights.state, made_for=made_for)
    print(f"{path}: {report}")
    if not allow_mismatch:
        _refuse_poor(report, weights.state, model.state_dict(), path)
    model.load_state_dict(fitting, strict=False)
    return report


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """Interpolate a table of relative positions, bicubic, to windows of another side.

    Args: table: ((2w - 1)**2, N).  window: w'.
    Returns: ((2w' - 1)**2, N).
    Source: the official finetuning code.
    """
    side, new_side = isqrt(len(table)), 2 * window - 1
    image = table.T.unflatten(1, (side, side))[None]  # (1, N, 2w - 1, 2w - 1)
    return F.interpolate(image, size=(new_side, new_side), mode="bicubic", align_corners=False)[0].flatten(1).T


@torch.no_grad()
def _resize(model: nn.Module, name: str, value: Tensor, own: Tensor, made_for: tuple[int, int] | None) -> Tensor | None:
    """Resize a table to the model's own; None if it is not a table, or of an architecture that does not match."""
    if name.endswith(BIAS_TABLE):
        return resize_bias_table(value, window_size(name, own)) if value.shape[1] == own.shape[1] else None
    if not name.endswith("pos_embed") or value.ndim != own.ndim or value.shape[-1] != own.shape[-1]:
        return None
    if value.ndim == 4:  # (1, H, W, C)
        old, new = (tuple(tensor.shape[1:3]) for tensor in (value, own))
        return resize_positions(value.flatten(1, 2), old, new).unflatten(1, new)
    new_grid = _table_grid(model, name)
    if new_grid is None or new_grid[0] * new_grid[1] != own.shape[1]:
        return None
    side = isqrt(value.shape[1])
    grid = (side, side)
    if made_for is not None:
        # A decoder's table has a coarser grid than the encoder's; its length tells the stride.
        stride = isqrt(made_for[0] * made_for[1] // value.shape[1])
        grid = (made_for[0] // stride, made_for[1] // stride)
    return resize_positions(value, grid, new_grid) if grid[0] * grid[1] == value.shape[1] else None


def _table_grid(model: nn.Module, name: str) -> tuple[int, int] | None:
    """The token grid (H, W) of a model's own position table; None if the module does not have one."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if hasattr(owner, "grid"):  # a decoder
        return owner.grid  # type: ignore[return-value]
    if not hasattr(owner, "image_size"):
        return None
    (height, width), stride = owner.image_size, owner.strides[0]  # type: ignore[misc, index]
    return height // stride, width // stride


def _refuse_poor(report: LoadReport, state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise ValueError with the reason, if weights match a model poorly."""
    theirs, ours = describe(state), describe(own)
    anyway = "pass allow_mismatch=True to load what fits"
    reshaped = [name for name in report.mismatched if name.startswith(ENCODER)]
    if theirs != ours and (reshaped or report.matched_share < MIN_MATCHED):
        raise ValueError(
            f"{path} holds weights of {theirs}; the model has {ours}: build the model that the weights belong to "
            f"(mixmae.convert.load_encoder does so), or choose another file. {report}"
        )
    decoder = {name for name in own if name.startswith(DECODER)}
    if decoder and decoder <= {*report.missing, *report.mismatched}:
        raise ValueError(
            f"{path} holds no weights for the model's decoder, an encoder only: give a pretraining checkpoint, or "
            f"{anyway} and train a fresh decoder. {report}"
        )
    if reshaped:
        there, here = (tuple(tensors[reshaped[0]].shape) for tensors in (state, own))
        raise ValueError(f"{path} has {reshaped[0]} of shape {there}, and the model of {here}: {anyway}. {report}")
    if report.matched_share < MIN_MATCHED:
        raise ValueError(
            f"{path} fills {report.matched_share:.1%} of the model's tensors, less than {MIN_MATCHED:.0%}: choose "
            f"another file, or {anyway}. {report}"
        )
