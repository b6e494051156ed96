"""What dense tasks cost, against runs on real tensors and the paper's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixmae.data.images.detect_augment import DetectAugmentConfig
from mixmae.data.images.segment_augment import SegmentAugmentConfig
from mixmae.detection.config import DetectorConfig
from mixmae.detection.losses import detection_step
from mixmae.detection.model import Detector
from mixmae.jobs.config import DetectConfig, SegmentConfig
from mixmae.jobs.estimate import (
    build_model,
    build_on_meta,
    checkpoint_bytes,
    cost_of,
    forward_macs,
    loss_of,
    micro_batch_unit,
)
from mixmae.jobs.full_detector import FullDetector, full_target, num_regions
from mixmae.segmentation.upernet import UPerNetConfig
from pipelines.recipes import DETECT_RECIPES, SEGMENT_RECIPES
from tests.factories import noise_images, seeded, tiny_swin

NUM_CLASSES, BATCH = 5, 2
DETECTOR = DetectorConfig(
    fpn_dim=16,
    anchor_sizes=(8, 16, 32, 64, 128),
    rpn_samples=32,
    box_dim=16,
    proposals=40,
    roi_samples=32,
    mask_samples=6,
    norm="group",
)
SEGMENT = SegmentConfig(
    encoder=tiny_swin().config,
    augment=SegmentAugmentConfig(image_size=96),
    head=UPerNetConfig(channels=16, aux_channels=16, dropout=0.0),
    slide_stride=64,
)
DETECT = DetectConfig(encoder=tiny_swin().config, augment=DetectAugmentConfig(image_size=96), detector=DETECTOR)


def kept_by_a_real_step(config) -> int:
    """Bytes that the forward of a step on real tensors keeps for backward, beside weights and images."""
    torch.manual_seed(0)
    model, images = build_model(config, NUM_CLASSES), noise_images(BATCH)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # as long as it is held no other one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(config, model, images, NUM_CLASSES)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("config", [SEGMENT, DETECT, replace(DETECT, detector=replace(DETECTOR, masks=False))])
def test_a_step_on_tensors_without_values_keeps_what_a_real_one_keeps(config):
    assert sum(cost_of(config, BATCH, NUM_CLASSES).activations.values()) == kept_by_a_real_step(config)


@pytest.mark.parametrize("config", [SEGMENT, DETECT])
def test_flops_are_three_forwards(config):
    flops = cost_of(config, BATCH, NUM_CLASSES).flops / BATCH
    assert flops == pytest.approx(6 * forward_macs(config, NUM_CLASSES), rel=0.05)


def test_heads_have_all_regions_to_look_at():
    """The model is a detector whose proposals are known: with its own ones it would find a few objects' regions."""
    torch.manual_seed(0)
    model = FullDetector(tiny_swin(), NUM_CLASSES, DETECTOR)
    images, targets = noise_images(BATCH), [full_target((96, 96)) for _ in range(BATCH)]
    seen = []
    model.roi_heads.box_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model.roi_heads.mask_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    full = detection_step(model, images, targets, seeded(), 0)
    assert num_regions(DETECTOR) == (32, 6)
    assert seen == [BATCH * 32, BATCH * 6]
    assert full.metrics["positives"] == 8
    assert full.metrics["proposal_recall"] == 1
    usual = Detector(tiny_swin(), NUM_CLASSES, DETECTOR)
    usual.load_state_dict(model.state_dict())
    own = detection_step(usual, images, targets, seeded(), 0)
    assert own.metrics["loss/rpn_obj"] == full.metrics["loss/rpn_obj"]  # anchors are the same, and all that is drawn


@pytest.mark.parametrize(
    ("name", "num_classes", "gmacs"),
    [
        # docs/detection.md: 518.5 for every pixel; 0.13 per region and 0.53 per mask. docs/segmentation.md: 302.1 and
        # the auxiliary head.
        ("mixmae_swin_base_coco_55ep", 80, 652),
        ("mixmae_swin_base_ade20k_160k", 150, 303),
    ],
)
def test_computation_of_the_papers_recipes(name, num_classes, gmacs):
    config = {**SEGMENT_RECIPES, **DETECT_RECIPES}[name]()
    assert round(forward_macs(config, num_classes) / 1e9) == gmacs


def test_a_checkpoint_has_moments_of_what_is_trained():
    model = build_on_meta(DETECT, NUM_CLASSES)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 2 * 128  # the encoder's final norm
    tables = sum(b.numel() for name, b in model.named_buffers() if name in model.state_dict())
    trained = sum(p.numel() for p in model.parameters()) - frozen
    assert checkpoint_bytes(model) == pytest.approx(4 * (3 * trained + frozen + tables), rel=1e-3)


def test_batch_norms_of_a_upernet_need_two_images():
    assert micro_batch_unit(SEGMENT) == 2
    assert micro_batch_unit(replace(SEGMENT, head=replace(SEGMENT.head, norm="group"))) == 1
    assert micro_batch_unit(DETECT) == 1
