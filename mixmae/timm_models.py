"""`import mixmae.timm_models` registers the encoders with timm: timm.create_model("mixmae_swin_base", ...).

Unusual, beside timm's models: `pretrained` may be the path of any weights that mixmae.convert reads; a model of any
architecture is "mixmae_encoder" with encoder={"type": "SwinConfig", ...}, which is what exported hub folders name;
forward_features gives (B, L, C) tokens; the state dict is that of an ImageClassifier (encoder.*, head.*).

Legend: B images, C channels, H W pixels or the grid of a stage, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from mixmae.convert import first_conv, fit_weights, load_checked, read_weights, to_ours, with_channels
from mixmae.encoders.base import head_depth
from mixmae.encoders.build import SIZES, EncoderConfig, build_encoder, config_at_size, config_from_json
from mixmae.finetune.classification import HEAD_STD
from mixmae.patches import image_sides

ANY_ENCODER = "mixmae_encoder"

__all__ = ["TimmEncoder"]


class TimmEncoder(nn.Module):
    """An encoder with timm's interface: an ImageClassifier whose head can be changed or left out.

    Args:
        encoder: the architecture, or its JSON (encoders.build.config_to_json).
        img_size: side, or height and width, in pixels; default the config's. At 384 px Swin has the official windows.
        in_chans, num_classes, drop_rate, drop_path_rate: timm's; num_classes=0 leaves the head out.
        global_pool: "avg", or "" to give every token.
        fields: further fields of the config, such as window_sizes.
    Raises: ValueError for values that do not make an encoder.
    """

    def __init__(
        self,
        encoder: EncoderConfig | Mapping[str, Any],
        *,
        img_size: int | Sequence[int] | None = None,
        in_chans: int | None = None,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **fields: Any,
    ) -> None:
        super().__init__()
        config = config_from_json(encoder) if isinstance(encoder, Mapping) else encoder
        if img_size is not None and (side := _side(img_size)) != _side(config.image_size):
            config = config_at_size(config, side)
        if in_chans is not None:
            config = replace(config, in_channels=in_chans)
        self.encoder = build_encoder(replace(config, drop_path=drop_path_rate, **fields))
        self.in_chans = self.encoder.in_channels
        self.num_features = self.head_hidden_size = self.encoder.channels[-1]
        last = [f"blocks.{self.encoder.num_blocks - 1}"]  # of a plain ViT, which has no stages
        modules = last if len(self.encoder.strides) == 1 else [f"stages.{i}" for i in range(len(self.encoder.strides))]
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"encoder.{module}"}
            for width, stride, module in zip(self.encoder.channels, self.encoder.strides, modules, strict=True)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = ""
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Score images (B, C, H, W): (B, num_classes) logits."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalised tokens of the last stage, (B, L, C)."""
        return self.encoder(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, L, C), and classify them unless pre_logits is set."""
        if self.global_pool:
            x = x.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the output of chosen stages.

        Args: timm's; indices are stages, all of which always run.  output_fmt: "NCHW", "NHWC" or "NLC".
        Returns: a list of features, or the final tokens (B, L, C) and the list.
        Raises: ValueError for another output_fmt.
        """
        shape = {"NCHW": lambda t: t, "NHWC": lambda t: t.permute(0, 2, 3, 1), "NLC": lambda t: t.flatten(2).mT}
        if output_fmt not in shape:
            raise ValueError(f"output_fmt must be one of {', '.join(shape)}, got {output_fmt!r}")
        stages = range(len(self.feature_info))
        if indices is None:
            taken = list(stages)
        else:
            taken = list(stages[-indices:]) if isinstance(indices, int) else [stages[index] for index in indices]
        features = self.encoder.features(x)
        final = self.encoder.final(features[-1]) if norm or not intermediates_only else None
        if norm and final is not None:
            features[-1] = final.mT.reshape(features[-1].shape)
        chosen = [shape[output_fmt](features[stage]) for stage in taken]
        return chosen if intermediates_only or final is None else (final, chosen)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a fresh head.   Raises: ValueError for another pooling than "avg" or ""."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f'global_pool must be "avg" or "", got {global_pool!r}')
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(iter(self.encoder.named_parameters()))[1]
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay by timm's rule, beside vectors: tables of positions and the class token."""
        names = ("relative_position_bias_table", "pos_embed", "cls_token")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Give a function from a parameter's name to its depth by timm's rule, for layer decay; coarse or not."""
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.parameter_depths().items()}
        return lambda name: depths.get(name, head_depth(self.encoder, "timm"))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises: ValueError if enable is set: the encoders keep their activations."""
        if enable:
            raise ValueError("these encoders have no gradient checkpointing")

    def load_pretrained(self, path: str) -> None:
        """Load weights of any format that mixmae.convert reads; tables and input channels are fitted to the model.

        Raises: ValueError as convert.load_pretrained; a head of other classes stays fresh.
        """
        weights = read_weights(path)
        load_checked(self, with_channels(weights, self.in_chans), path)


def _filter(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Make a state dict that timm has read fit the model; its head and input channels are left to timm."""
    ours = {name: value for name, value in to_ours(state).items() if name.startswith(("encoder.", "head."))}
    height, width = model.pretrained_cfg["input_size"][1:]
    return ours | fit_weights(model, ours, made_for=(height, width))[0]


def _create(
    variant: str, encoder: EncoderConfig | Mapping[str, Any], pretrained: bool | str | Path, kwargs: dict[str, Any]
) -> Any:
    config = config_from_json(encoder) if isinstance(encoder, Mapping) else encoder
    with torch.device("meta"):
        model = build_encoder(config)
    overlay = {"first_conv": first_conv(model), **(kwargs.pop("pretrained_cfg_overlay", None) or {})}
    if isinstance(pretrained, str | Path):
        overlay["file"], pretrained = str(pretrained), True
    if "file" in overlay:
        overlay["custom_load"] = True
    feature_cfg: dict[str, Any] = {"feature_cls": "getter"}
    if kwargs.get("features_only"):
        feature_cfg["out_indices"] = tuple(range(len(model.strides)))
    return build_model_with_cfg(
        TimmEncoder,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_filter,
        feature_cfg=feature_cfg,
        encoder=config,
        **kwargs,
    )


def _register(variant: str, size: Callable[[], EncoderConfig]) -> None:
    def entrypoint(pretrained: bool | str | Path = False, **kwargs: Any) -> Any:
        return _create(variant, size(), pretrained, kwargs)

    entrypoint.__name__ = variant
    entrypoint.__doc__ = size.__doc__
    register_model(entrypoint)


def _side(size: int | Sequence[int]) -> int | tuple[int, int]:
    """A square's side, or (height, width)."""
    height, width = image_sides(size if isinstance(size, int) else (size[0], size[1]))
    return height if height == width else (height, width)


_CFG = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "num_classes": 1000,
    "classifier": "head",
}

default_cfgs = generate_default_cfgs(
    {name: dict(_CFG) for name in (ANY_ENCODER, *(f"mixmae_{size}" for size in SIZES))}
)


@register_model
def mixmae_encoder(pretrained: bool | str | Path = False, *, encoder: Mapping[str, Any], **kwargs: Any) -> Any:
    """An encoder of any architecture, given as JSON."""
    return _create(ANY_ENCODER, encoder, pretrained, kwargs)


for _name, _size in SIZES.items():
    _register(f"mixmae_{_name}", _size)
