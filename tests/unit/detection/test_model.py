"""The detector: its size and cost to the digit, its gradients, and that what it draws depends on the image alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

from mixmae.detection.config import DetectorConfig
from mixmae.detection.losses import detection_step
from mixmae.detection.model import Detector
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import swin_base, swin_large, with_dense_windows
from mixmae.flops import count_macs
from mixmae.objects import Target
from tests.factories import noise_images, small_swin, tiny_pcpvt, tiny_pvt, tiny_resnetv2, tiny_svt, tiny_swin, tiny_vit

COCO_CLASSES = 80
TINY = DetectorConfig(
    fpn_dim=16,
    anchor_sizes=(8, 16, 32, 64, 128),
    anchor_ratios=(1.0,),
    rpn_convs=1,
    box_convs=1,
    box_dim=16,
    mask_convs=1,
    rpn_samples=32,
    proposals_before_nms=(50, 50),
    proposals=20,
    roi_samples=16,
    norm="group",
)


def tiny_detector(config=TINY, encoder=None, num_classes=3):
    torch.manual_seed(0)
    return Detector(encoder or tiny_swin((96, 96)), num_classes, config)


def target(*boxes, labels=None, canvas=(96, 96), size=None):
    masks = torch.zeros(len(boxes), *canvas, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(corners, torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), masks, size or canvas)


class Dense(nn.Module):
    """What the model computes for every pixel, as a module that can be counted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.dense(images)


def on_meta(size, **changes):
    config = replace(with_dense_windows(size()), absolute_positions=False, image_size=1024)
    with torch.device("meta"):
        return Detector(build_encoder(config), COCO_CLASSES, DetectorConfig(stage_norms=False, **changes))


@pytest.mark.parametrize(
    ("size", "parameters", "trained"),
    [(swin_base, 109_491_437, 109_489_389), (swin_large, 218_210_537, 218_207_465)],
)
def test_parameters_to_the_digit(size, parameters, trained):
    """The paper prints 110 M for B; its 319 M for L must be 219. What is not trained is the encoder's final norm."""
    model = on_meta(size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    with torch.device("meta"):
        normed = Detector(build_encoder(with_dense_windows(size())), COCO_CLASSES)
    assert sum(p.numel() for p in normed.parameters()) == parameters + 2 * 15 * size().embed_dim


@pytest.mark.parametrize(
    ("size", "dense_macs", "total_g"), [(swin_base, 518_476_464_128, 701), (swin_large, 937_148_743_680, 1119)]
)
def test_computation_to_the_digit(size, dense_macs, total_g):
    """701 and 1119 G are the paper's, with 1,000 proposals and 100 masks. It also counts 2 per element of a batch norm
    and 4 per element that the pyramid enlarges, together 0.25 G."""
    model = on_meta(size)
    dense = count_macs(Dense(model), 1024).total
    box = count_macs(nn.Sequential(model.roi_heads.box_head, model.roi_heads.box_predictor), 7, in_channels=256).total
    mask = count_macs(
        nn.Sequential(model.roi_heads.mask_head, model.roi_heads.mask_predictor), 14, in_channels=256
    ).total
    assert dense == dense_macs
    # detectron2's are 128.86 and 52.99 G for so many: its boxes and masks have no channels for the background
    assert box == 4 * 49 * 589_824 + 12_544 * 1024 + 1024 * (81 + 4 * 81)
    assert mask == 4 * 196 * 589_824 + 196 * 4 * 65_536 + 784 * 256 * 81
    assert round((dense + 1000 * box + 100 * mask) / 1e9 + 0.25) == total_g


@pytest.mark.parametrize("size", [swin_base, swin_large])
def test_other_heads_cost_something_else(size):
    """The pins above can fail: the usual RPN has one convolution."""
    assert (
        count_macs(Dense(on_meta(size, rpn_convs=1)), 1024).total < count_macs(Dense(on_meta(size)), 1024).total - 5e10
    )


def test_heads_have_the_names_of_torchvisions():
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=COCO_CLASSES + 1)
    ours = on_meta(swin_base).state_dict()
    heads = {name: value for name, value in theirs.state_dict().items() if name.startswith(("rpn.", "roi_heads."))}
    assert len(heads) > 50
    assert {name: value.shape for name, value in heads.items()} == {name: ours[name].shape for name in heads}


@pytest.mark.parametrize("make", [tiny_swin, tiny_pvt, tiny_pcpvt, tiny_svt, tiny_resnetv2])
def test_every_trained_parameter_gets_a_gradient(make):
    """Also of an encoder's norm that nothing reads, which distributed training would stop at."""
    encoder = make()
    sizes = (*(2 * stride for stride in encoder.strides), 4 * encoder.strides[-1])
    model = tiny_detector(replace(TINY, anchor_sizes=sizes), encoder)
    targets = [target((10, 10, 40, 50), (50, 20, 90, 80), labels=[1, 2])]
    detection_step(model, noise_images(1), targets, torch.Generator().manual_seed(0), 0).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
@pytest.mark.parametrize("first_stage", [0, 2])
def test_images_without_objects(norm, first_stage):
    """Finite losses, and a gradient for every parameter, as the other workers have."""
    levels = {0: (8, 16, 32, 64, 128), 2: (32, 64)}
    model = tiny_detector(replace(TINY, norm=norm, first_stage=first_stage, anchor_sizes=levels[first_stage]))
    output = detection_step(model, noise_images(2), [target(), target()], torch.Generator().manual_seed(0), 0)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.metrics["loss/mask"] == output.metrics["loss/box"] == 0
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_pyramid_of_three_stages():
    encoder = small_swin(32)
    assert len(encoder.strides) == 2
    sizes = tuple(2 * stride for stride in encoder.strides)
    model = tiny_detector(replace(TINY, anchor_sizes=sizes), encoder)
    found = model.eval().detect(noise_images(2, (32, 32)), [(32, 32), (20, 32)])
    assert len(found) == 2
    assert all((item.boxes[:, 3] <= 20).all() for item in found[1:])


def test_encoders_without_a_pyramid_are_refused():
    with pytest.raises(ValueError, match="detection needs an encoder of several stages"):
        Detector(tiny_vit(), 3)
    with pytest.raises(ValueError, match="anchor_sizes has 2 levels, and the encoder has 4 stages"):
        tiny_detector(replace(TINY, anchor_sizes=(8, 16)))


def test_draws_depend_on_the_image_and_not_on_its_batch():
    model = tiny_detector()
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=10.0)  # anchors that differ, so that the choice tells
    images = noise_images(2)
    targets = [target((10, 10, 40, 50)), target((30, 20, 90, 80), (5, 60, 30, 90), labels=[1, 2])]

    def parts(images, targets, first):
        return detection_step(model, images, targets, torch.Generator().manual_seed(3), first).metrics

    both = parts(images, targets, 0)
    apart = [parts(images[index : index + 1], targets[index : index + 1], index) for index in range(2)]
    for name in ("loss/rpn_obj", "loss/rpn_box", "positives"):
        assert both[name].item() == pytest.approx((apart[0][name] + apart[1][name]).item() / 2, rel=1e-4), name
    assert parts(images, targets, 0)["loss/cls"] == both["loss/cls"]
    assert parts(images, targets, 1)["loss/cls"] != both["loss/cls"]


def test_proposals_stay_in_the_image_and_in_float32():
    model = tiny_detector().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        levels, logits, offsets = model.dense(noise_images(1))
        (boxes,) = model.propose(logits, offsets, model.anchors(levels), [(60, 80)])
    assert boxes.dtype == torch.float32
    assert 0 < len(boxes) <= TINY.proposals
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 80
    assert boxes[:, 3].max() <= 60


def test_proposals_of_bfloat16_are_those_of_float32_to_half_a_pixel():
    """At 900 px, where bfloat16 itself has steps of 4 px."""
    config = replace(TINY, anchor_sizes=(32, 64, 128, 256, 512), proposals_before_nms=(400, 400), proposals=400)
    model = tiny_detector(replace(config, proposal_nms_iou=1.0), tiny_swin((1024, 1024))).eval()
    images = noise_images(1, (1024, 1024))
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels, logits, offsets = model.dense(images)
            ones = [torch.zeros_like(level) for level in logits]  # in the order of the anchors
            found.append(model.propose(ones, offsets, model.anchors(levels), [(1024, 1024)])[0])
    far = found[0].amax(dim=1) > 600
    assert far.sum() > 20
    assert (found[0] - found[1])[far].abs().max() < 0.5


def test_a_perfect_head_finds_the_objects():
    """Class, box and mask that are given to the heads come out of `detect`, one per object."""
    model = tiny_detector().eval()
    boxes = torch.tensor([[10.0, 10.0, 40.0, 50.0], [50.0, 20.0, 90.0, 80.0]])
    model.propose = lambda *_: [torch.cat([boxes, boxes + 1])]
    scores = torch.full((4, 4), -9.0)
    scores[[0, 1, 2, 3], [1, 3, 1, 3]] = torch.tensor([9.0, 8.0, 5.0, 5.0])
    model.roi_heads.boxes = lambda regions: (scores, torch.zeros(4, 4, 4))
    channels = torch.tensor([-9.0, 2.0, -9.0, 3.0])  # of background and the three classes
    model.roi_heads.masks = lambda regions: channels[:, None, None].expand(len(regions), 4, 28, 28)
    (found,) = model.detect(noise_images(1), [(96, 96)])
    assert found.labels.tolist() == [0, 2]
    torch.testing.assert_close(found.masks[:, 0, 0], torch.tensor([2.0, 3.0]).sigmoid())
    assert torch.equal(found.boxes, boxes)
    assert found.masks.shape == (2, 28, 28)
    assert found.scores[0] > found.scores[1] > 0.99


def test_without_masks_it_has_no_mask_head():
    model = tiny_detector(replace(TINY, masks=False))
    assert not [name for name, _ in model.named_parameters() if "mask" in name]
    output = detection_step(model, noise_images(1), [target((10, 10, 40, 50))], torch.Generator(), 0)
    assert "loss/mask" not in output.metrics
    assert model.eval().detect(noise_images(1), [(96, 96)])[0].masks is None
