"""The linear head, and the probe that runs its frozen encoder on every batch."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from mixmae.convert import to_ours
from mixmae.finetune.classification import ImageClassifier, classification_step
from mixmae.probing.linear import LinearHead, LinearProbe
from mixmae.training.loop import LoopConfig, Silent, TrainState, train
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.schedule import RunLength
from tests.factories import noise_images, seeded, tiny_swin


def test_the_head_normalises_each_feature_and_then_is_linear():
    head, features = LinearHead(3, 2), torch.randn(50, 3, generator=seeded()) * 5 + 2
    deviation = features.var(dim=0, unbiased=False).add(1e-6).sqrt()
    expected = (features - features.mean(dim=0)) / deviation @ head.linear.weight.T
    torch.testing.assert_close(head(features), expected)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_a_batch_of_one_image_is_normalised_by_those_before():
    head, features = LinearHead(3, 2), torch.randn(50, 3, generator=seeded()) * 5 + 2
    head(features)
    before = head.norm.running_var.clone()
    alone = head(features[:1])
    assert torch.equal(head.norm.running_var, before)
    torch.testing.assert_close(alone, head.eval()(features[:1]))


def test_folded_it_is_the_head_of_a_classifier():
    torch.manual_seed(0)
    encoder, images = tiny_swin(64), noise_images(3, (64, 64))
    head = LinearHead(encoder.channels[-1], 5)
    for seed in range(4):
        head(torch.randn(20, encoder.channels[-1], generator=seeded(seed)) * 3 + 1)  # fills the running statistics
    torch.nn.init.normal_(head.linear.bias)
    head.eval()
    with_norm, folded = ImageClassifier(encoder, 5), ImageClassifier(encoder, 5)
    with_norm.head = head
    folded.head.load_state_dict(head.as_linear().state_dict())
    torch.testing.assert_close(folded(images), with_norm(images))


def test_the_usual_loop_trains_the_head_and_nothing_else():
    torch.manual_seed(0)
    encoder = tiny_swin(64)
    probe = LinearProbe(encoder, LinearHead(encoder.channels[-1], 2))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == [
        "head.linear.weight",
        "head.linear.bias",
    ]
    batch = SimpleNamespace(images=noise_images(8, (64, 64)), labels=torch.arange(8) % 2, broken=())
    optim = OptimConfig(optimizer="lars", base_lr=0.1, weight_decay=0.5)
    state = train(
        model=probe,
        optimizer=build_optimizer(probe, optim),
        peak_lr=30.0,
        clip_grad_norm=None,
        step_function=lambda model, batch, *place: classification_step(model, batch.images, batch.labels, *place),
        batches=itertools.repeat(batch),
        state=TrainState(),
        config=LoopConfig(epochs=30, warmup_epochs=3, batch_size=8),
        length=RunLength(total_steps=30, warmup_steps=3, steps_per_epoch=1),
        events=Silent(),
        device=torch.device("cpu"),
    )
    assert state.metrics["loss"] < 0.2  # over the last ten steps; log 2 = 0.69 at chance level
    assert state.metrics["top1"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_the_encoder_stays_in_evaluation_mode(mode):
    probe = LinearProbe(tiny_swin(64).train(), LinearHead(128, 2))
    assert probe.head.training
    assert not any(module.training for module in probe.encoder.modules())
    probe.train(mode)
    assert not any(module.training for module in probe.encoder.modules())
    assert all(module.training == mode for module in probe.head.modules())


def test_a_checkpoint_of_a_probe_is_read_as_a_classifier():
    torch.manual_seed(0)
    probe, images = LinearProbe(tiny_swin(64), LinearHead(128, 3)), noise_images(4, (64, 64))
    for seed in range(4):
        probe(noise_images(4, (64, 64), seed=seed))  # fills the running statistics
    classifier = ImageClassifier(tiny_swin(64), 3).eval()
    classifier.load_state_dict(to_ours(probe.state_dict()))
    torch.testing.assert_close(classifier(images), probe.eval()(images))
