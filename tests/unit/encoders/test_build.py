"""Encoder configs as JSON."""

import json

import pytest

from mixmae.encoders.build import config_from_json, config_to_json, size_name
from mixmae.encoders.swin import SwinConfig, swin_base


def test_configs_as_json():
    config = SwinConfig(image_size=(64, 96), embed_dim=24, num_heads=(2, 3, 4, 6), drop_path=0.1)
    content = json.loads(json.dumps(config_to_json(config)))
    assert content["type"] == "SwinConfig"
    assert config_from_json(content) == config
    assert size_name(config) is None
    assert size_name(SwinConfig(**{**vars(swin_base()), "image_size": 384, "drop_path": 0.1})) == "swin_base"
    with pytest.raises(ValueError, match="no encoder config 'Mamba'; known are SwinConfig"):
        config_from_json({"type": "Mamba"})
    with pytest.raises(ValueError, match="SwinConfig has no field teeth"):
        config_from_json(content | {"teeth": 3})
    with pytest.raises(ValueError, match="do not make a SwinConfig"):
        config_from_json(content | {"depths": None})
