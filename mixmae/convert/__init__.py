"""Weights in other projects' formats, to ours and back; loading them into models; our own encoder files.

A file of names/ is one dialect of names. Its functions take dicts of tensors: is_X recognises the names, from_X renames
them to ours, and to_X, where there is one, does the reverse. docs/weights.md shows how they are used.
"""

from mixmae.convert.architecture import Architecture, describe, read_architecture
from mixmae.convert.channels import adapt_channels, channels_of, with_channels
from mixmae.convert.formats import FORMATS, detect_format, to_ours
from mixmae.convert.load import (
    LoadReport,
    fit_weights,
    load_checked,
    load_pretrained,
    load_weights,
    resize_bias_table,
)
from mixmae.convert.metadata import EncoderMetadata, Preprocessing, digest_of
from mixmae.convert.models import build_model, encoder_state, first_conv, load_encoder
from mixmae.convert.names.mae import config_from_mae, from_mae
from mixmae.convert.names.mmpretrain import config_from_mmpretrain, from_mmpretrain, to_mmpretrain
from mixmae.convert.names.official import config_from_official, from_official, to_official
from mixmae.convert.names.pvt import from_pvt, from_timm_pvt_v2, to_timm_pvt_v2
from mixmae.convert.names.resnetv2 import from_timm_resnetv2, to_timm_resnetv2
from mixmae.convert.names.swin import from_microsoft_swin, from_simmim_swin, from_timm_swin
from mixmae.convert.names.twins import from_twins, to_twins
from mixmae.convert.read import Weights, read_state_dict, read_weights
from mixmae.convert.write import save_encoder, save_tensors
from mixmae.layers.positions import resize_positions

__all__ = [
    "FORMATS",
    "Architecture",
    "EncoderMetadata",
    "LoadReport",
    "Preprocessing",
    "Weights",
    "adapt_channels",
    "build_model",
    "channels_of",
    "config_from_mae",
    "config_from_mmpretrain",
    "config_from_official",
    "describe",
    "detect_format",
    "digest_of",
    "encoder_state",
    "first_conv",
    "fit_weights",
    "from_mae",
    "from_microsoft_swin",
    "from_mmpretrain",
    "from_official",
    "from_pvt",
    "from_simmim_swin",
    "from_timm_pvt_v2",
    "from_timm_resnetv2",
    "from_timm_swin",
    "from_twins",
    "load_checked",
    "load_encoder",
    "load_pretrained",
    "load_weights",
    "read_architecture",
    "read_state_dict",
    "read_weights",
    "resize_bias_table",
    "resize_positions",
    "save_encoder",
    "save_tensors",
    "to_mmpretrain",
    "to_official",
    "to_ours",
    "to_timm_pvt_v2",
    "to_timm_resnetv2",
    "to_twins",
    "with_channels",
]
