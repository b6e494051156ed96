"""Normalisation of a mix against its definition: nn.GroupNorm on the tokens of one image at a time."""

import pytest
import torch
from torch import nn

from mixmae.layers.group_norm import MixedGroupNorm
from mixmae.mixing import draw_group_map, upsample_group_map
from tests.factories import seeded

BATCH, DIM, SIZE = 2, 12, (8, 12)


@pytest.fixture
def norm():
    norm = MixedGroupNorm(4, DIM)
    nn.init.normal_(norm.weight, generator=seeded(1))
    nn.init.normal_(norm.bias, generator=seeded(2))
    return norm


@pytest.fixture
def x():
    return 3 * torch.randn(BATCH, DIM, *SIZE, generator=seeded()) + 5


@pytest.mark.parametrize("num_maps", [1, BATCH])
def test_each_image_is_normalised_as_if_alone(norm, x, num_maps):
    group_map = draw_group_map((2, 3), 4, seeded(), num_maps)  # 6 cells over 4 images: groups of one and of two
    mixed = norm(x, group_map)
    places = upsample_group_map(group_map, SIZE)
    for b in range(BATCH):
        for group in range(4):
            own = places[b % num_maps] == group
            alone = nn.functional.group_norm(x[b][:, own][None], 4, norm.weight, norm.bias)[0]
            torch.testing.assert_close(mixed[b][:, own], alone, rtol=1e-5, atol=1e-5)


def test_one_group_or_no_map_is_group_norm(norm, x):
    plain = nn.GroupNorm(4, DIM)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))
    torch.testing.assert_close(norm(x, torch.zeros(1, 2, 3, dtype=torch.int64)), plain(x), rtol=1e-5, atol=1e-5)


def test_not_even_an_overflow_crosses_groups(norm, x):
    group_map = draw_group_map((2, 3), 2, seeded())
    own = upsample_group_map(group_map, SIZE)[0] == 0
    broken = x.masked_fill(~own, float("inf"))
    assert torch.equal(norm(x, group_map)[..., own], norm(broken, group_map)[..., own])


def test_half_precision_is_summed_in_full(norm, x):
    group_map = draw_group_map((2, 3), 2, seeded())
    offset = x.bfloat16() + 60  # the deviation is 3: sums of squares of 64 in bfloat16 would drown it
    got = norm.bfloat16()(offset, group_map)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), norm.float()(offset.float(), group_map), rtol=1e-2, atol=2e-2)


def test_cells_that_do_not_divide_the_grid(norm, x):
    with pytest.raises(ValueError, match="5 x 3 cells does not divide a grid of 8 x 12"):
        norm(x, torch.zeros(1, 5, 3, dtype=torch.int64))
