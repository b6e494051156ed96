"""What dense tasks (detection, segmentation) need of an encoder beside its features: a norm on each stage's output.

The norms are no part of the encoder, whose weights stay those of pretraining and of classification. They are trained at
the rate of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mixmae.encoders.base import Encoder


class StageNorms(nn.Module):
    """A layer norm over the channels of each stage's output, named norm0, norm1, ... as in other Swin detectors.

    Args: channels: width of each stage.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.num_stages = len(channels)
        for stage, width in enumerate(channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(width))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Normalise (B, channels[s], H, W) of each stage; the same shapes."""
        return [
            self.get_submodule(f"norm{stage}")(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for stage, feature in enumerate(features)
        ]


def freeze_final_norm(encoder: Encoder) -> None:
    """Stop training the final norm, which features() does not pass.

    It stays in the encoder, so that its weights can be loaded and written as always; but a parameter without a
    gradient would stop distributed training.
    """
    for name, parameter in encoder.named_parameters():
        if name.split(".")[0] == "norm":
            parameter.requires_grad_(False)
