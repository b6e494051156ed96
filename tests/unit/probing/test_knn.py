"""Nearest neighbours: by hand, on sets that are easy or hopeless, and mistakes."""

import math

import pytest
import torch

from mixmae.probing import knn
from mixmae.probing.knn import KnnConfig, knn_classify, knn_leave_one_out
from tests.factories import seeded


def clouds(num_images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four well separated classes in 16 dimensions, at lengths that say nothing."""
    centres = torch.randn(4, 16, generator=seeded(99))
    labels = torch.arange(num_images) % 4
    features = centres[labels] + 0.2 * torch.randn(num_images, 16, generator=seeded(seed))
    return features * (0.1 + 10 * torch.rand(num_images, 1, generator=seeded(seed + 1))), labels


def test_votes_by_hand():
    """Cosines to the query (1, 0) are 1, 0.6, 0 and -1; the three nearest vote."""
    train = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.1], [-1.0, 0.0]])
    result = knn_classify(
        train,
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([[5.0, 0.0]]),
        torch.tensor([1]),
        num_classes=3,
        config=KnnConfig(k=3, temperature=0.5),
    )
    weights = [math.exp(1 / 0.5), math.exp(0.6 / 0.5), 1.0]
    expected = torch.tensor([[weights[0], weights[1] + weights[2], 0.0]]) / sum(weights)
    torch.testing.assert_close(result.probabilities, expected)
    assert result.accuracy.top == {1: 0.0, 5: 1.0}


def test_leave_one_out_by_hand():
    """On a line of angles each image's nearest other one is of the other class, but for the last two."""
    angles = torch.tensor([0.0, 0.1, 1.0, 1.3])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    result = knn_leave_one_out(features, torch.tensor([0, 1, 0, 0]), num_classes=2, config=KnnConfig(k=1))
    assert result.probabilities.tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]
    assert result.accuracy.top[1] == 0.5


def test_separable_features_are_told_apart_and_noise_is_not():
    (train, classes), (test, labels) = clouds(400), clouds(400, seed=7)
    options = {"num_classes": 4, "config": KnnConfig()}
    assert knn_classify(train, classes, test, labels, **options).accuracy.top[1] == 1.0
    assert knn_leave_one_out(train, classes, **options).accuracy.top[1] == 1.0
    noise, others = (torch.randn(400, 16, generator=seeded(seed)) for seed in (3, 4))
    # Chance within 3 sigma; an image that votes for itself would be right far more often.
    assert 0.18 < knn_classify(noise, classes, others, labels, **options).accuracy.top[1] < 0.32
    assert 0.18 < knn_leave_one_out(noise, classes, **options).accuracy.top[1] < 0.32


def test_chunks_change_nothing(monkeypatch):
    train, test = (torch.randn(60, 16, generator=seeded(seed)) for seed in (0, 1))
    labels, options = torch.arange(60) % 4, {"num_classes": 4, "config": KnnConfig(k=7)}

    def both():
        yield knn_classify(train, labels, test, labels, **options).probabilities
        yield knn_leave_one_out(train, labels, **options).probabilities

    whole = list(both())
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 60 * 8)  # 8 queries at a time
    torch.testing.assert_close(list(both()), whole)


def test_unknown_images_neither_vote_nor_are_judged():
    (train, classes), (test, labels) = clouds(60), clouds(8, seed=7)
    config = KnnConfig(k=7)
    classes[:20], labels[0] = -1, -1
    result = knn_classify(train, classes, test, labels, num_classes=4, config=config)
    fewer = knn_classify(train[20:], classes[20:], test, labels, num_classes=4, config=config)
    torch.testing.assert_close(result.probabilities, fewer.probabilities)
    assert (result.accuracy.num_judged, result.accuracy.num_unknown) == (7, 1)
    alone = knn_leave_one_out(train, classes, num_classes=4, config=config)
    assert (len(alone.probabilities), alone.accuracy.num_judged) == (40, 40)


def test_mistakes():
    (train, classes), (test, labels) = clouds(12), clouds(8, seed=7)
    options = {"num_classes": 4, "config": KnnConfig(k=5)}
    with pytest.raises(ValueError, match="k is 13, but only 12 training images"):
        knn_classify(train, classes, test, labels, num_classes=4, config=KnnConfig(k=13))
    with pytest.raises(ValueError, match="k is 12, but only 11 training images"):
        knn_leave_one_out(train, classes, num_classes=4, config=KnnConfig(k=12))
    with pytest.raises(ValueError, match=r"1 classes have no training image, for example class 2, so their 2 images"):
        knn_classify(train[classes != 2], classes[classes != 2], test, labels, **options)
    with pytest.raises(ValueError, match="have 16 values and the others 15"):
        knn_classify(train, classes, test[:, :15], labels, **options)
    with pytest.raises(ValueError, match="from 0 to 3, but there are 3 classes"):
        knn_classify(train, classes, test, labels, num_classes=3, config=KnnConfig(k=5))
    with pytest.raises(ValueError, match="not finite"):
        knn_classify(train / 0, classes, test, labels, **options)
    with pytest.raises(ValueError, match="at least one image"):
        knn_classify(train, classes[:3], test, labels, **options)
    with pytest.raises(ValueError, match="k is 0"):
        KnnConfig(k=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        KnnConfig(temperature=0)
