"""Weights to export, in the forms that the exporters need, and the comparison of an exported model with ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixmae.convert.metadata import NOT_STATED, EncoderMetadata, digest_of
from mixmae.convert.models import build_model, encoder_state
from mixmae.convert.read import Weights, read_weights
from mixmae.training.run_folder import run_around, weights_of

TOLERANCE = 1e-4
"""Largest allowed difference between the outputs of an exported model and ours, relative to the largest value (float32
rounding gives about 1e-6)."""
TIES = 1e-3
"""Largest share of indices, such as the best class, that may be others: where two values are nearly the same."""


class Program(Protocol):
    """A model to export with its code: what the writers of programs need to know."""

    @property
    def model(self) -> nn.Module:
        """In evaluation mode; images to a tensor, or to several."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """A name for each of them."""

    @property
    def about(self) -> dict[str, Any]:
        """What is written into the file, as JSON."""

    def images(self, batch: int) -> Tensor:
        """Noise to compare outputs on: (batch, C, H, W) float32, always the same."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Weights to export, in the forms that the exporters need."""

    weights: Weights
    """As read, including a decoder."""
    model: nn.Module
    """The encoder, or the classifier if there is a head, in evaluation mode."""
    state: dict[str, Tensor]
    """The model's weights in our names."""
    metadata: EncoderMetadata
    run_folder: Path | None
    """The folder of the run that made them; None for other weights."""

    @property
    def kind(self) -> str:
        """What file names call it."""
        return "encoder" if self.metadata.num_classes is None else "classifier"

    @property
    def official(self) -> dict[str, Tensor]:
        """The weights that fit the official classes: those of the model, and a decoder of MixMAE's kind."""
        decodes = "decoder.embed.weight" in self.weights.state  # SimMIM's decoder has no embed
        kept = {name: value for name, value in self.weights.state.items() if decodes and name.startswith("decoder.")}
        return self.state | kept

    @property
    def outputs(self) -> tuple[str, ...]:
        """See Program."""
        return ("tokens" if self.metadata.num_classes is None else "logits",)

    @property
    def about(self) -> dict[str, Any]:
        """See Program."""
        return self.metadata.to_json()

    def images(self, batch: int) -> Tensor:
        """See Program."""
        return noise(batch, self.metadata.encoder.in_channels, self.metadata.preprocessing.image_size)


def read_export(
    source: Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data_licence: str = NOT_STATED,
    key: str | None = None,
) -> Export:
    """Read the weights and build their model.

    Args:
        source: the folder of a run or a sweep (its best weights, else its last checkpoint), or what read_weights takes.
        mean, std: of the pixel normalisation, one value per channel; default those of the weights' metadata.
        data_licence: as in EncoderMetadata; default that of the metadata.
        key: as in read_weights.
    Raises: ValueError if the weights cannot be read or built, or mean or std do not have one value per channel;
        FileNotFoundError.
    """
    path = weights_of(source)
    weights = read_weights(path, key=key)
    model, metadata = build_model(weights, path)
    preprocessing = replace(
        metadata.preprocessing,
        mean=tuple(mean or metadata.preprocessing.mean),
        std=tuple(std or metadata.preprocessing.std),
    )
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != metadata.encoder.in_channels:
            raise ValueError(f"--{name} needs a value for each of the {metadata.encoder.in_channels} channels")
    state = encoder_state(model)[1]
    licence = data_licence if data_licence != NOT_STATED else metadata.data_licence
    metadata = replace(metadata, preprocessing=preprocessing, data_licence=licence, digest=digest_of(state))
    run = run_around(path) if path.is_dir() else None
    return Export(weights=weights, model=model, state=state, metadata=metadata, run_folder=run)


def noise(batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Images to compare outputs on, always the same.   Args: size: (H, W).   Returns: (batch, channels, H, W)."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def compare(item: Program, name: str, run: Callable[[Tensor], Tensor | Sequence[Tensor]]) -> str:
    """Compare the outputs of an exported model and ours, for other batch sizes than it was exported with.

    Args: item: what was exported.  name: of the program, for messages.  run: the exported model, images to outputs.
    Returns: the largest difference, in words.
    Raises: ValueError if it is above TOLERANCE, or of indices above TIES.
    """
    worst = 0.0
    for batch in (1, 3):
        images = item.images(batch)
        with torch.no_grad():
            pairs = zip(_parts(item.model(images)), _parts(run(images)), strict=True)
        for expected, found in pairs:
            if not expected.is_floating_point():
                others = (found != expected).float().mean().item()
                if others > TIES:
                    raise ValueError(f"{name} gives other indices than the model ({others:.1%} of them): not written")
                continue
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{name} gives other numbers than the model ({difference:.1e} of the largest): not written"
                )
            worst = max(worst, difference)
    return f", {name} differs by {worst:.0e} of the largest value"


def _parts(output: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (output,) if isinstance(output, Tensor) else output
