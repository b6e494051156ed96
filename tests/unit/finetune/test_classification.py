"""The classifier on top of an encoder, and a step of its finetuning."""

import pytest
import torch
from torch import nn

from mixmae.data.images.mixup import MixupConfig, mix_batch
from mixmae.finetune.classification import ImageClassifier, Predictor, classification_step
from tests.factories import noise_images, seeded, tiny_swin


def test_logits_are_a_linear_map_of_the_mean_token():
    classifier, images = ImageClassifier(tiny_swin(), 7), noise_images(2, (64, 96))
    mean = classifier.encoder(images).mean(1)
    torch.testing.assert_close(classifier(images), mean @ classifier.head.weight.T + classifier.head.bias)


def test_a_new_head_says_nothing_yet():
    classifier = ImageClassifier(tiny_swin(), 1000)
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert classifier.head.bias.abs().max() == 0


def test_a_predictor_normalises_and_says_probabilities():
    """(0.6 - 0.2) / 0.5 and so on by hand, times ten."""
    predictor = Predictor(Means(), mean=(0.2, 0.5, 0.0), std=(0.5, 0.25, 1.0))  # type: ignore[arg-type]
    pixels = torch.tensor([153, 102, 51], dtype=torch.uint8)[:, None, None].expand(2, 3, 4, 4)
    expected = torch.tensor([8.0, -4.0, 2.0]).softmax(dim=0).expand(2, 3)
    torch.testing.assert_close(predictor(pixels), expected)


def test_no_classes():
    with pytest.raises(ValueError, match="at least 1"):
        ImageClassifier(tiny_swin(), 0)


class Means(nn.Module):
    """Logits that can be told at sight: the mean of each of three channels, times ten."""

    def forward(self, images):
        return 10 * images.mean(dim=(2, 3))


def plain(*means: tuple[float, float, float]) -> torch.Tensor:
    """Images of one colour each."""
    return torch.tensor(means)[:, :, None, None].expand(-1, -1, 8, 8).clone()


def test_a_step_without_mixing_by_hand():
    images = plain((0.1, 0.0, 0.0), (0.0, 0.2, 0.0))
    output = classification_step(Means(), images, torch.tensor([0, 0]), seeded(), 0, label_smoothing=0.3)
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    targets = torch.tensor([0.8, 0.1, 0.1])  # 0.7 for class 0, and 0.3 over all three
    torch.testing.assert_close(output.loss, -(targets * logits.log_softmax(1)).sum(1).mean())
    assert output.metrics["top1"] == 0.5


def test_a_step_with_mixing_by_hand():
    """Half of each image is the other one: with these logits the loss is that of the mean logits and labels."""
    images = plain((0.4, 0.0, 0.0), (0.0, 0.2, 0.0))

    def half(images, labels, generator):
        assert labels.tolist() == [0, 1]
        return images.lerp(images.flip(0), 0.5), torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])

    output = classification_step(Means(), images, torch.tensor([0, 1]), seeded(), 0, mix=half)
    expected = -torch.tensor([2.0, 1.0, 0.0]).log_softmax(0)[:2].mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.metrics == {}  # no accuracy of what is not of one class


def mixup(images, labels, generator):
    return mix_batch(MixupConfig(), images, labels, 3, generator)


def test_the_mixing_depends_on_the_step_and_the_place_in_the_global_batch_alone():
    images, labels = noise_images(6, (32, 32)), torch.arange(6) % 3

    def loss(step: int, first_sample: int):
        return classification_step(Means(), images, labels, seeded(step), first_sample, mix=mixup).loss

    assert loss(0, 0) == loss(0, 0)
    losses = [loss(step, first_sample).item() for step in (0, 1) for first_sample in (0, 6, 12)]
    assert len(set(losses)) == 6


@pytest.mark.parametrize("mix", [None, mixup], ids=["plain", "mixed"])
def test_images_without_a_class_are_left_out(mix):
    images, labels = noise_images(4, (32, 32)), torch.tensor([2, -1, 0, 1])
    output = classification_step(Means(), images, labels, seeded(), 0, mix=mix)
    kept = [0, 2, 3]
    expected = classification_step(Means(), images[kept], labels[kept], seeded(), 0, mix=mix)
    assert torch.equal(output.loss, expected.loss)
    with pytest.raises(ValueError, match="none of the 4 images"):
        classification_step(Means(), images, torch.full((4,), -1), seeded(), 0, mix=mix)


def test_finetuning_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, images, labels = ImageClassifier(tiny_swin(64), 4), noise_images(8, (64, 64)), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        output = classification_step(model, images, labels, seeded(), 0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert output.loss < 0.05
    assert output.metrics["top1"] == 1.0
