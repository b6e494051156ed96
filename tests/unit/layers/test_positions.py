"""Position tables against their definitions."""

import math

import pytest
import torch

from mixmae.layers.positions import positions_on_grid, relative_position_bias, sin_cos_positions


def test_sin_cos_by_hand():
    table = sin_cos_positions(8, (2, 3))
    assert table.shape == (6, 8)
    row, column = 1, 2
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table[row * 3 + column].tolist() == pytest.approx(expected)


def test_the_stored_grid_gets_the_table_and_others_it_resized():
    table = sin_cos_positions(16, (3, 3))[None]
    assert positions_on_grid(table, (3, 3), (3, 3)) is table
    wide = positions_on_grid(table, (3, 3), (3, 6)).view(3, 6, -1)
    # Twice as many columns: pairs of them lie around the old ones, and rows are as they were.
    torch.testing.assert_close(wide[..., 8:], table.view(3, 3, -1)[:, :1, 8:].expand(-1, 6, -1))
    assert wide[0, 2, 0] < table[0, 1, 0] < wide[0, 3, 0]  # the sine of the column rises


def test_sin_cos_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4"):
        sin_cos_positions(6, (2, 2))


@pytest.mark.parametrize("window", [(4, 4), (2, 3), (1, 4), (1, 1)])
def test_bias_of_a_pair_depends_on_its_offset(window):
    """A smaller window reads the centre of the same table."""
    side, num_heads = 4, 2
    table = torch.randn((2 * side - 1) ** 2, num_heads, generator=torch.Generator().manual_seed(0))
    bias = relative_position_bias(table, window)
    places = [(row, column) for row in range(window[0]) for column in range(window[1])]
    assert bias.shape == (num_heads, len(places), len(places))
    for query, (row, column) in enumerate(places):
        for key, (key_row, key_column) in enumerate(places):
            entry = (row - key_row + side - 1) * (2 * side - 1) + column - key_column + side - 1
            assert torch.equal(bias[:, query, key], table[entry])
