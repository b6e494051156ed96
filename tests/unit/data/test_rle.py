"""Run-length masks: hand-worked strings, as pycocotools writes them, and the way back."""

import numpy as np
import pytest

from mixmae.data.rle import decode_rle, encode_rle


def test_by_hand():
    """Columns first: (0 1 / 1 1) is one 0, then three 1."""
    assert encode_rle(np.array([[False, True], [True, True]])) == b"13"
    assert encode_rle(np.array([[True, False]])) == b"011"  # an empty run of 0 begins


def test_long_runs_and_falling_runs():
    """Runs 2, 40, 50, 3, 5: the third is written as itself, the others from the fourth on as differences of two before.

    40 = 8 + 32 * 1 is two groups, 50 = 18 + 32; 3 - 40 = -37 = -5 - 32, whose low group is 27 and whose rest is -2."""
    mask = np.zeros(100, dtype=bool)
    mask[2:42] = mask[92:95] = True
    text = encode_rle(mask.reshape(1, 100))
    assert text == bytes(
        [48 + 2, 48 + 8 + 32, 48 + 1, 48 + 18 + 32, 48 + 1, 48 + 27 + 32, 48 + 30, 48 + 19 + 32, 48 + 30]
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 3)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_there_and_back(size, share):
    mask = np.random.default_rng(0).random(size) < share
    assert (decode_rle(encode_rle(mask), size) == mask).all()


def test_runs_that_do_not_fill_the_mask():
    with pytest.raises(ValueError, match="4 pixels, and its image is of 2 x 3"):
        decode_rle(b"13", (2, 3))
