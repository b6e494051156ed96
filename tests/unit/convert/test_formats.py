"""Formats are told apart by their names."""

import pytest
import timm
import torch

from mixmae.convert import (
    config_from_official,
    detect_format,
    from_mmpretrain,
    from_official,
    to_mmpretrain,
    to_official,
)
from tests.factories import tiny_mixmae, tiny_pvt_v2, tiny_resnetv2, tiny_svt, tiny_swin, tiny_vit


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (to_official(tiny_mixmae().state_dict()), "mixmim"),
        (to_mmpretrain(tiny_mixmae().state_dict()), "mmpretrain"),
        (tiny_mixmae().state_dict(), "mixmae"),
        (tiny_swin().state_dict(), "encoder"),
        (tiny_pvt_v2().state_dict(), "encoder"),
        (tiny_svt().state_dict(), "encoder"),
        (tiny_vit().state_dict(), "mae"),
        (tiny_resnetv2().state_dict(), "timm_resnetv2"),
    ],
)
def test_formats_are_detected(state, name):
    assert detect_format(state) == name


def test_unknown_formats_get_a_list_of_the_known():
    # Of the ResNets v2 only BiT's are ours: the others have batch norms, and would give other numbers unnoticed.
    with torch.device("meta"), pytest.raises(ValueError, match="in no known format"):
        detect_format(timm.create_model("resnetv2_50").state_dict())
    state = timm.create_model("resnet10t").state_dict()
    with pytest.raises(ValueError, match=r"they start with conv1.*known are: official MixMIM, .*SimMIM.*MAE"):
        detect_format(state)
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        from_official(tiny_mixmae().state_dict())
    with pytest.raises(ValueError, match="not an official MixMIM model"):
        config_from_official({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a MixMIM model of mmpretrain"):
        from_mmpretrain(tiny_mixmae().state_dict())
