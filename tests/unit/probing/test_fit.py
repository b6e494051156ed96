"""Heads on cached features. Needs scikit-learn, for its digits and as the reference of a linear classifier."""

from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mixmae.probing.fit import LinearProbeConfig, small_set_probe, train_probe
from mixmae.probing.linear import LinearHead
from mixmae.training.optim import OptimConfig
from tests.factories import seeded


def clouds(num_images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four well separated classes in 16 dimensions."""
    centres = torch.randn(4, 16, generator=seeded(99))
    labels = torch.arange(num_images) % 4
    return centres[labels] + 0.2 * torch.randn(num_images, 16, generator=seeded(seed)), labels


def run(features, labels, config, validation=None, classes=4):
    torch.manual_seed(0)
    head = LinearHead(features.shape[1], classes)
    return head, train_probe(head, features, labels, config, validation=validation)


LARS = OptimConfig(optimizer="lars", base_lr=10.0, weight_decay=0.0)


@pytest.mark.parametrize("config", [LinearProbeConfig(optim=LARS), small_set_probe()], ids=["lars", "adamw"])
def test_separable_features_are_told_apart_and_noise_is_not(config):
    (features, labels), (other, classes) = clouds(400), clouds(400, seed=7)
    _, curves = run(features, labels, config, (other, classes))
    assert curves.val_top1[-1] == 1.0
    assert curves.train_top1[-1] == 1.0
    noise, others = (torch.randn(400, 16, generator=seeded(seed)) for seed in (3, 4))
    assert 0.18 < run(noise, labels, config, (others, classes))[1].val_top1[-1] < 0.32  # chance within 3 sigma


def test_a_small_set_is_classified_as_well_as_by_logistic_regression():
    pixels, digits = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=seeded())
    pixels = (pixels[order].float() @ torch.randn(64, 256, generator=seeded(1))).relu()
    digits = digits[order]
    train, test = slice(0, 600), slice(600, None)
    _, curves = run(pixels[train], digits[train], small_set_probe(), (pixels[test], digits[test]), classes=10)
    scaled = ((pixels - pixels[train].mean(0)) / (pixels[train].std(0) + 1e-6)).numpy()
    reference = LogisticRegression(C=0.1, max_iter=300).fit(scaled[train], digits[train])
    assert curves.val_top1[-1] > reference.score(scaled[test], digits[test]) - 0.01


def test_the_same_run_twice_and_with_another_seed():
    features, labels = clouds(50)
    config = LinearProbeConfig(epochs=6, warmup_epochs=1, batch_size=16)
    first, curves = run(features, labels, config)
    second, again = run(features, labels, config)
    assert curves == again
    assert torch.equal(first.linear.weight, second.linear.weight)
    other, _ = run(features, labels, LinearProbeConfig(epochs=6, warmup_epochs=1, batch_size=16, seed=1))
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_three_steps_by_hand():
    """Four images in batches that are capped at the set: rates 0, 1/2 and 1 of base_lr x 4 / 256 in the warmup."""
    features, labels = clouds(4)
    optim = replace(LARS, base_lr=64.0)
    head, curves = run(features, labels, LinearProbeConfig(epochs=3, warmup_epochs=2, optim=optim))
    torch.manual_seed(0)
    expected = LinearHead(16, 4)
    weight, bias = expected.linear.weight, expected.linear.bias
    velocity, push = torch.zeros_like(weight), torch.zeros_like(bias)
    losses = []
    for rate in (0.0, 0.5, 1.0):  # peak_lr = 64 x 4 / 256 = 1; step 2 starts the cosine at its top
        loss = torch.nn.functional.cross_entropy(expected(features), labels)
        by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
        velocity = 0.9 * velocity + 0.001 * weight.detach().norm() / by_weight.norm() * by_weight
        push = 0.9 * push + by_bias
        with torch.no_grad():
            weight -= rate * velocity
            bias -= rate * push
        losses.append(loss.item())
    torch.testing.assert_close(head.linear.weight, weight)
    torch.testing.assert_close(head.linear.bias, bias)
    assert curves.loss == pytest.approx(losses)
    assert curves.val_top1 == []
    assert not head.training


def test_curves_have_a_point_an_epoch_and_every_image_is_seen():
    features, labels = clouds(50)
    seen = []
    head = LinearHead(16, 4)
    head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]) if module.training else None)
    curves = train_probe(head, features, labels, LinearProbeConfig(epochs=4, warmup_epochs=0, batch_size=16))
    assert len(seen) == 12  # floor(4 x 50 / 16)
    assert len(curves.loss) == len(curves.train_top1) == 4
    places = [int((features == row).all(dim=1).nonzero()) for row in torch.cat(seen)]
    for epoch in range(3):
        assert sorted(places[epoch * 50 : epoch * 50 + 50]) == list(range(50))
    assert places[:50] != places[50:100]


def test_unknown_classes_are_left_out():
    features, labels = clouds(50)
    config = LinearProbeConfig(epochs=6, warmup_epochs=1, batch_size=16)
    hidden = torch.cat([labels, torch.full((10,), -1)])
    with_unknown, _ = run(torch.cat([features, torch.ones(10, 16)]), hidden, config)
    assert torch.equal(with_unknown.linear.weight, run(features, labels, config)[0].linear.weight)


def test_mistakes():
    features, labels = clouds(8)
    with pytest.raises(ValueError, match="finite features"):
        run(features / 0, labels, LinearProbeConfig())
    with pytest.raises(ValueError, match=r"\(8, 16\) and \(7,\)"):
        run(features, labels[:7], LinearProbeConfig())
    with pytest.raises(ValueError, match="from 0 to 3, but the head has 3 classes"):
        run(features, labels, LinearProbeConfig(), classes=3)
    with pytest.raises(ValueError, match="1 images with a class"):
        run(features[:1], labels[:1], LinearProbeConfig())
    with pytest.raises(ValueError, match="warmup_epochs is 91"):
        LinearProbeConfig(warmup_epochs=91)
    with pytest.raises(ValueError, match="batch_size is 0"):
        LinearProbeConfig(batch_size=0)
