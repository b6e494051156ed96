"""Attention to reduced keys against a plain loop over tokens, and who may attend to whom."""

import pytest
import torch

from mixmae.layers.blocks import group_attn_mask
from mixmae.layers.spatial_reduction import SpatialReductionAttention
from mixmae.mixing import draw_group_map, upsample_group_map
from tests.factories import seeded

DIM, HEADS, BATCH = 8, 2, 3


def attend_by_hand(attention, x, group_map):
    """Let each token read, one at a time, the keys of its group."""
    batch, height, width, dim = x.shape
    side = attention.sr_ratio
    query = attention.q(x).view(batch, height, width, HEADS, -1)
    read = torch.zeros_like(query)
    for b in range(batch):
        groups = torch.zeros(height, width) if group_map is None else group_map[b % len(group_map)]
        keys, values, of = [], [], []
        for i in range(0, height, side):
            for j in range(0, width, side):
                key = x[b, i, j]
                if side > 1:
                    block = x[b, i : i + side, j : j + side].permute(2, 0, 1)  # (C, R, R), as a convolution's weight
                    key = attention.norm((attention.sr.weight * block).sum((1, 2, 3)) + attention.sr.bias)
                key, value = attention.kv(key).view(2, HEADS, -1)
                keys.append(key)
                values.append(value)
                of.append(groups[i, j])
        for i in range(height):
            for j in range(width):
                own = [n for n, group in enumerate(of) if group == groups[i, j]]
                scores = torch.stack([(keys[n] * query[b, i, j]).sum(1) for n in own]) / (dim // HEADS) ** 0.5  # (n, N)
                read[b, i, j] = (scores.softmax(0)[..., None] * torch.stack([values[n] for n in own])).sum(0)
    return attention.proj(read.flatten(3))


@pytest.mark.parametrize("num_maps", [0, 1, BATCH])
@pytest.mark.parametrize("sr_ratio", [1, 2, 4])
def test_attention_is_that_of_a_plain_loop(sr_ratio, num_maps):
    torch.manual_seed(0)
    attention, x = SpatialReductionAttention(DIM, HEADS, sr_ratio), torch.randn(BATCH, 4, 8, DIM)
    group_map = upsample_group_map(draw_group_map((1, 2), 2, seeded(), num_maps), (4, 8)) if num_maps else None
    with torch.no_grad():
        read = attention(x, group_attn_mask(group_map, sr_ratio))
        torch.testing.assert_close(read, attend_by_hand(attention, x, group_map), rtol=1e-5, atol=1e-6)


def test_keys_of_other_groups_are_not_attended_to():
    """Two cells side by side, of two groups: two tokens by one key each."""
    group_map = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    left, right = [True, False], [False, True]
    assert group_attn_mask(group_map, 2)[0, 0].tolist() == [left, left, right, right] * 2
    torch.manual_seed(0)
    attention, x = SpatialReductionAttention(DIM, HEADS, 2), torch.randn(1, 2, 4, DIM)
    changed = x.clone()
    changed[:, :, 2:] += 1
    with torch.no_grad():
        grouped = [attention(each, group_attn_mask(group_map, 2)) for each in (x, changed)]
        plain = [attention(each, None) for each in (x, changed)]
    assert torch.equal(grouped[0][:, :, :2], grouped[1][:, :, :2])
    assert not torch.equal(plain[0][:, :, :2], plain[1][:, :, :2])
