"""Order of pixels in a patch, and the statistics of the targets."""

import pytest
import torch

from mixmae.patches import draw_predictions, interpolate_hidden, normalise_patches, patchify, unpatchify
from tests.factories import noise_images


def test_pixels_are_ordered_row_column_channel():
    image = torch.arange(2 * 4 * 2).view(1, 2, 4, 2)  # channel c, row r, column x has the value 8c + 2r + x
    patches = patchify(image, 2)
    assert patches.tolist() == [[[0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]]]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(96, 160), (64, 32)])
def test_unpatchify_undoes_patchify(channels, size):
    images = noise_images(2, size, channels)
    grid = (size[0] // 32, size[1] // 32)
    patches = patchify(images, 32)
    assert torch.equal(unpatchify(patches, 32, grid), images)
    stacked = torch.stack([patches, -patches], dim=1)  # further leading sides stay as they are
    assert torch.equal(unpatchify(stacked, 32, grid), torch.stack([images, -images], dim=1))


def test_statistics_by_hand():
    normalised, mean, std = normalise_patches(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    assert mean.item() == 3.0
    assert std.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)  # unbiased: 14 over 4 - 1
    assert normalised[0, 3].item() == pytest.approx(3 / std.item())


def test_statistics_undo_the_normalisation_of_flat_patches_too():
    patches = torch.cat([patchify(noise_images(1), 32)[0], torch.full((1, 3072), 0.7)])
    normalised, mean, std = normalise_patches(patches)
    torch.testing.assert_close(normalised * std + mean, patches)
    assert normalised[-1].abs().max() < 1e-3


def test_hidden_patches_take_the_values_of_visible_ones_by_distance():
    values = torch.tensor([1.0, 50.0, 70.0, 9.0])[:, None]
    hidden = torch.tensor([False, True, True, False])
    between = interpolate_hidden(values, hidden, (1, 4)).flatten()
    expected = [1.0, (1 + 9 / 8) / (1 + 1 / 8), (1 / 8 + 9) / (1 / 8 + 1), 9.0]  # weights 1 / distance^3
    torch.testing.assert_close(between, torch.tensor(expected))
    both = interpolate_hidden(values.expand(3, 2, 4, 1), torch.stack([hidden, ~hidden])[None], (1, 4))
    torch.testing.assert_close(both[2, 0, :, 0], between)
    assert both[0, 1, :, 0].tolist() == pytest.approx([(50 + 70 / 8) / 1.125, 50, 70, (50 / 8 + 70) / 1.125])


def test_drawn_predictions_by_hand():
    """Two patches of two pixels, the second hidden: both get the mean 2 and the std of the first."""
    target = normalise_patches(torch.tensor([[1.0, 3.0], [100.0, 200.0]]).repeat_interleave(2, dim=1))
    predicted, hidden = torch.tensor([[1.0, 1, -1, -1], [0.5, 0.5, 0, 0]]), torch.tensor([False, True])
    drawn = draw_predictions(predicted, target, hidden, 2, (1, 2), normalised=True)
    std = (4 / 3) ** 0.5
    upper, lower = [2 + std] * 2 + [2 + std / 2] * 2, [2 - std] * 2 + [2.0] * 2
    torch.testing.assert_close(drawn["reconstructions"], torch.tensor([[upper, lower]]))
    torch.testing.assert_close(drawn["zero_predictions"], torch.full((1, 2, 4), 2.0))
    plain = draw_predictions(predicted, target, hidden, 2, (1, 2), normalised=False)
    assert torch.equal(plain.pop("reconstructions"), unpatchify(predicted, 2, (1, 2)))
    assert not plain


def test_bad_shapes():
    with pytest.raises(ValueError, match="patches of 32 px"):
        patchify(noise_images(1, (90, 96)), 32)
    with pytest.raises(ValueError, match="3 x 4 patches"):
        unpatchify(torch.zeros(1, 9, 3072), 32, (3, 4))
