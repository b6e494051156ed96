"""Weights to export, in the forms that the exporters need, and the comparison of an exported model with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmae.convert.metadata import EncoderMetadata
from mixmae.convert.read import Weights

TOLERANCE = 1e-4
"""Largest allowed difference between the outputs of an exported model and ours, relative to the largest value (float32
rounding gives about 1e-6)."""


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

    def images(self, batch: int) -> Tensor:
        """Noise to compare outputs on: (batch, C, H, W) float32, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(
            batch, self.metadata.encoder.in_channels, *self.metadata.preprocessing.image_size, generator=generator
        )


def compare(item: Export, name: str, run: Callable[[Tensor], Tensor]) -> str:
    """Compare the outputs of an exported model and ours, for other batch sizes than it was exported with.

    Args: item: what was exported.  name: of the program, for messages.  run: the exported model, images to output.
    Returns: the largest difference, in words.
    Raises: ValueError if it is above TOLERANCE.
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
