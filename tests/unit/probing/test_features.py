"""Features and logits of many images: the numbers of the model itself, in order, and the model as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.probing.features import extract_features, predict_logits
from tests.factories import seeded

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PIXELS = torch.randint(0, 256, (5, 3, 64, 64), generator=seeded(), dtype=torch.uint8)
LABELS = torch.tensor([4, -1, 2, 3, 0])


def batches(*sizes: int):
    parts = zip(PIXELS.split(list(sizes)), LABELS.split(list(sizes)), strict=True)
    return (SimpleNamespace(images=images, labels=labels) for images, labels in parts)


def normalised() -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (PIXELS / 255 - mean) / std


def restless_encoder() -> SwinEncoder:
    """One whose outputs are random in training mode."""
    torch.manual_seed(0)
    heads = {"num_heads": (1, 2, 4, 8), "window_sizes": (8, 8, 4, 2)}
    return SwinEncoder(SwinConfig(image_size=64, embed_dim=8, depths=(1, 1, 2, 1), drop_path=0.9, **heads))


def test_features_are_the_mean_tokens_in_evaluation_mode():
    encoder = restless_encoder()
    features, labels = extract_features(encoder, batches(2, 2, 1), mean=MEAN, std=STD)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(labels, LABELS)
    encoder.eval()
    torch.testing.assert_close(features, encoder(normalised()).mean(dim=1), rtol=1e-5, atol=1e-6)


def test_logits_are_the_classifiers():
    classifier = ImageClassifier(restless_encoder(), 5)
    logits, labels = predict_logits(classifier, batches(3, 2), mean=MEAN, std=STD)
    assert torch.equal(labels, LABELS)
    torch.testing.assert_close(logits, classifier.eval()(normalised()), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(fails):
    encoder = restless_encoder().train()
    encoder.stages[0].eval()  # a part that is frozen
    before = [module.training for module in encoder.modules()]
    assert set(before) == {True, False}

    def failing():
        yield from batches(5)
        raise RuntimeError("the disk is gone")

    if fails:
        with pytest.raises(RuntimeError, match="disk"):
            extract_features(encoder, failing(), mean=MEAN, std=STD)
    else:
        extract_features(encoder, batches(5), mean=MEAN, std=STD)
    assert [module.training for module in encoder.modules()] == before


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        predict_logits(nn.Linear(1, 1), [], mean=MEAN, std=STD)
