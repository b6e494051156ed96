"""The objective: what is compared with what, and that nothing hidden reaches the encoder."""

import pytest
import torch

from mixmae.masking import draw_masks, hide
from mixmae.methods.simmim import SimMIMConfig
from mixmae.mixing import upsample_group_map
from mixmae.patches import patchify
from tests.factories import noise_images, seeded, tiny_resnetv2, tiny_simmim, tiny_swin, tiny_vit

ENCODERS = pytest.mark.parametrize("build", [tiny_swin, tiny_vit, tiny_resnetv2], ids=["swin", "vit", "resnetv2"])


def masks(batch=2, grid=(3, 3), seed=0):
    return draw_masks(grid, 0.6, seeded(seed), batch)


@ENCODERS
@pytest.mark.parametrize("normalise", [False, True])
def test_loss_is_the_mean_over_hidden_pixels(build, normalise):
    """Against loops over images and tokens, with the targets worked out anew."""
    method, images, mask = tiny_simmim(build(), normalise_targets=normalise), noise_images(2), masks()
    stride = method.encoder.strides[-1]
    predicted, _ = method.decode(method.encode(images, mask), mask)
    patches, across = patchify(images, stride), 96 // stride
    errors = []
    for b in range(2):
        for token in range(across * across):
            if mask[b, token // across * stride // 32, token % across * stride // 32]:
                target = patches[b, token]
                if normalise:
                    target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
                errors.append((predicted[b, token] - target).abs().mean())
    assert len(errors) == 12 * (32 // stride) ** 2
    torch.testing.assert_close(method(images, mask=mask).loss, torch.stack(errors).mean())


def test_loss_by_hand():
    """A head of zeros predicts zero: the loss is the mean absolute pixel of the hidden cells."""
    method, mask = tiny_simmim(), masks(1)
    torch.nn.init.zeros_(method.decoder.pred.weight)
    levels = torch.arange(9.0).view(1, 3, 3) - 4  # one level per cell
    images = upsample_group_map(levels, (96, 96))[:, None].expand(-1, 3, -1, -1)
    assert method(images, mask=mask).loss.item() == pytest.approx(levels[mask].abs().mean().item())


@ENCODERS
def test_hidden_pixels_do_not_reach_the_encoder(build):
    method, images, mask = tiny_simmim(build()), noise_images(2), masks()
    before = method.encode(images, mask)
    hidden = upsample_group_map(mask, (96, 96))[:, None]
    assert torch.equal(method.encode(torch.where(hidden, noise_images(2, seed=1), images), mask), before)
    assert not torch.equal(method.encode(torch.where(hidden, images, noise_images(2, seed=1)), mask), before)


@ENCODERS
def test_hidden_cells_show_the_mask_token(build):
    """Not the grey that blanked pixels would be embedded as."""
    method, images, mask = tiny_simmim(build()), noise_images(2), masks()
    before = method.encode(images, mask)
    assert not torch.allclose(before, method.encoder(hide(images, mask)), atol=1e-3)
    with torch.no_grad():
        method.mask_token.add_(torch.randn(method.mask_token.shape, generator=seeded(1)))
    assert not torch.allclose(method.encode(images, mask), before, atol=1e-3)


def test_masks_are_drawn_for_each_image():
    method, images = tiny_simmim(), noise_images(4)
    drawn = method(images, generator=seeded(3), with_pictures=True)
    mask = drawn.pictures["group_map"] == 1
    assert (mask.flatten(1).sum(1) == 6).all()  # 60 % of 9, rounded up
    assert len(mask.unique(dim=0)) > 1
    assert torch.equal(drawn.loss, method(images, mask=draw_masks((3, 3), 0.6, seeded(3), 4)).loss)
    assert not torch.equal(drawn.loss, method(images, generator=seeded(4)).loss)


def test_bad_inputs_name_the_remedy():
    method, images = tiny_simmim(), noise_images(2)
    with pytest.raises(ValueError, match=r"\(2 or 1, 3, 3\)"):
        method(images, mask=masks(grid=(6, 6)))
    with pytest.raises(ValueError, match="use larger images or smaller cells"):
        method(noise_images(2, (32, 32)), generator=seeded())
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        SimMIMConfig(mask_ratio=1)
    with pytest.raises(ValueError, match="would cut the encoder's last tokens of 32 px"):
        tiny_simmim(cell_px=16)
