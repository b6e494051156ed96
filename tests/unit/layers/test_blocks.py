"""The mask that keeps groups apart in attention."""

import pytest

from mixmae.layers.blocks import group_attn_mask
from mixmae.mixing import draw_group_map, upsample_group_map
from tests.factories import seeded


@pytest.mark.parametrize("num_images", [1, 2, 5])
@pytest.mark.parametrize("sr_ratio", [1, 2, 4])
def test_no_token_is_left_without_a_key(sr_ratio, num_images):
    group_map = upsample_group_map(draw_group_map((3, 2), num_images, seeded(), 4), (12, 8))
    attn_mask = group_attn_mask(group_map, sr_ratio)
    num_keys = 3 * 2 * (4 // sr_ratio) ** 2
    assert attn_mask.shape == (4, 1, 96, num_keys)  # one for all heads
    assert attn_mask.any(dim=-1).all()
    assert group_attn_mask(group_map[:1], sr_ratio).shape[0] == 1  # one for all samples
