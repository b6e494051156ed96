"""The classifier on top of an encoder."""

import pytest
import torch

from mixmae.finetune.classification import ImageClassifier
from tests.factories import noise_images, tiny_swin


def test_logits_are_a_linear_map_of_the_mean_token():
    classifier, images = ImageClassifier(tiny_swin(), 7), noise_images(2, (64, 96))
    mean = classifier.encoder(images).mean(1)
    torch.testing.assert_close(classifier(images), mean @ classifier.head.weight.T + classifier.head.bias)


def test_a_new_head_says_nothing_yet():
    classifier = ImageClassifier(tiny_swin(), 1000)
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert classifier.head.bias.abs().max() == 0


def test_no_classes():
    with pytest.raises(ValueError, match="at least 1"):
        ImageClassifier(tiny_swin(), 0)
