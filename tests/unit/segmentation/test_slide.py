"""Sliding windows: where they begin, and that their scores are averaged where they overlap."""

import pytest
import torch

from mixmae.segmentation.slide import slide, window_starts


@pytest.mark.parametrize(
    ("side", "expected"),
    [(300, [0]), (512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342]), (1024, [0, 341, 512])],
)
def test_window_starts(side, expected):
    """512 px each 341, as in segmentation code: the last window ends with the image."""
    assert window_starts(side, 512, 341) == expected


def _own_pixels(windows):
    """A model whose score is the pixel itself, at half the size."""
    return torch.nn.functional.avg_pool2d(windows, 2)


def test_a_model_of_single_pixels_gives_the_image_back():
    images = [torch.arange(9, dtype=torch.float32).repeat(7, 1)[None], torch.ones(1, 4, 4), torch.ones(1, 11, 6)]
    for batch_size in (1, 3, 100):
        scores = slide(_own_pixels, images, window=(4, 4), stride=2, batch_size=batch_size)
        assert [score.shape for score in scores] == [image.shape for image in images]
        torch.testing.assert_close(scores[1], images[1])
        torch.testing.assert_close(scores[2], images[2])
        assert (scores[0].diff(dim=2) >= 0).all()


def test_windows_are_averaged():
    """Each window scores its number: of three windows of 4 at 0, 2 and 3 of 7 columns, the columns show these means."""
    number = iter(range(3))

    def model(windows):
        return torch.stack([torch.full((1, 4, 4), float(next(number))) for _ in windows])

    (scores,) = slide(model, [torch.zeros(1, 4, 7)], window=(4, 4), stride=2, batch_size=2)
    assert scores[0, 0].tolist() == [0, 0, 0.5, 1, 1.5, 1.5, 2]


def test_small_images_are_padded_with_the_mean_colour():
    seen = []

    def model(windows):
        seen.append(windows)
        return windows

    (scores,) = slide(model, [torch.full((1, 2, 3), 5.0)], window=(4, 4), stride=4, batch_size=8)
    assert scores.shape == (1, 2, 3)
    assert seen[0][0, 0].tolist() == [[5, 5, 5, 0], [5, 5, 5, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
