"""The objective: what is compared with what, that nothing hidden is read, and that tokens return to their positions."""

import pytest
import torch

from mixmae.encoders.vit import ViTConfig, ViTEncoder
from mixmae.masking import draw_masks, visible_cells
from mixmae.methods.mae import MAEConfig
from mixmae.mixing import upsample_group_map
from mixmae.patches import patchify
from tests.factories import noise_images, seeded, tiny_mae, tiny_swin, tiny_vit


class PixelReader(ViTEncoder):
    """An encoder whose tokens are the pixels of their patches."""

    def __init__(self):
        super().__init__(ViTConfig(image_size=96, embed_dim=16 * 16 * 3, depth=1, num_heads=4))

    def encode_visible(self, images, visible):
        pixels = patchify(images, 16)
        return pixels[torch.arange(len(images))[:, None], visible]


def masks(batch=2, seed=0):
    return draw_masks((6, 6), 0.75, seeded(seed), batch)


def predict(method, images, mask):
    return method.decode(method.encode(images, visible_cells(mask)), mask)[0]


@pytest.mark.parametrize("normalise", [False, True])
def test_loss_is_the_mean_over_hidden_patches(normalise):
    """Against loops over images and patches, with the targets worked out anew."""
    method, images, mask = tiny_mae(normalise_targets=normalise), noise_images(2), masks()
    predicted, patches = predict(method, images, mask), patchify(images, 16)
    errors = []
    for b in range(2):
        for patch in range(36):
            if mask[b, patch // 6, patch % 6]:
                target = patches[b, patch]
                if normalise:
                    target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
                errors.append((predicted[b, patch] - target).square().mean())
    assert len(errors) == 2 * 27
    torch.testing.assert_close(method(images, mask=mask).loss, torch.stack(errors).mean())


def test_loss_by_hand():
    """A decoder that predicts zero: the mean square of the hidden patches, or one where targets are normalised."""
    images, mask = noise_images(1), masks(1)
    losses = {}
    for normalise in (False, True):
        method = tiny_mae(normalise_targets=normalise)
        torch.nn.init.zeros_(method.decoder.pred.weight)
        losses[normalise] = method(images, mask=mask).loss.item()
    assert losses[False] == pytest.approx(patchify(images, 16)[mask.flatten(1)].square().mean().item(), rel=1e-5)
    assert losses[True] == pytest.approx(767 / 768, rel=1e-4)  # the variance is unbiased, the mean is not


def test_tokens_return_to_their_positions():
    """Through an encoder that returns its input: each patch stands where it came from, hidden ones are zero."""
    method, images, mask = tiny_mae(PixelReader()), noise_images(3), masks(3)
    visible = visible_cells(mask)
    expected = patchify(images, 16) * ~mask.flatten(1)[..., None]
    assert torch.equal(method.encode(images, visible), expected)
    assert torch.equal(method.encode(images, visible.flip(1)), expected)  # whatever the order they were encoded in


def test_the_decoder_gets_tokens_mask_and_grid_in_step(monkeypatch):
    """A decoder that returns what it is given shows the visible patches in place, at both sides of an oblong image."""
    method, images = tiny_mae(PixelReader(), normalise_targets=False), noise_images(2, (64, 96))
    monkeypatch.setattr(method.decoder, "forward", lambda tokens, mask, grid: (tokens * ~mask[:, 0, :, None])[:, None])
    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    assert pictures["group_map"].shape == (2, 4, 6)
    assert torch.equal(pictures["reconstructions"][:, 0], pictures["mixed"])


def test_hidden_pixels_are_not_read():
    method, images, mask = tiny_mae(), noise_images(2), masks()
    before = predict(method, images, mask)
    hidden = upsample_group_map(mask, (96, 96))[:, None]
    assert torch.equal(predict(method, torch.where(hidden, noise_images(2, seed=1), images), mask), before)
    assert not torch.equal(predict(method, torch.where(hidden, images, noise_images(2, seed=1)), mask), before)


def test_what_is_seen_where_matters():
    """Two visible patches that swap places give other predictions: positions reach the encoder."""
    method, images, mask = tiny_mae(), noise_images(1), masks(1)
    first, second = visible_cells(mask)[0, :2].tolist()
    patches = patchify(images, 16)
    order = torch.arange(36)
    order[[first, second]] = order[[second, first]]
    swapped = patches[:, order].view(1, 6, 6, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 96, 96)
    assert not torch.allclose(predict(method, swapped, mask), predict(method, images, mask), atol=1e-3)


def test_masks_are_drawn_for_each_image():
    method, images = tiny_mae(), noise_images(4)
    drawn = method(images, generator=seeded(3), with_pictures=True)
    mask = drawn.pictures["group_map"] == 1
    assert (mask.flatten(1).sum(1) == 27).all()  # 75 % of 36
    assert len(mask.unique(dim=0)) == 4
    assert torch.equal(drawn.loss, method(images, mask=masks(4, seed=3)).loss)
    assert not torch.equal(drawn.loss, method(images, generator=seeded(4)).loss)


def test_bad_inputs_name_the_remedy():
    method, images = tiny_mae(), noise_images(2)
    with pytest.raises(ValueError, match=r"\(2 or 1, 6, 6\)"):
        method(images, mask=draw_masks((3, 3), 0.75, seeded(), 2))
    uneven = masks()
    uneven[0] = False
    with pytest.raises(ValueError, match="same number of cells"):
        method(images, mask=uneven)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        MAEConfig(mask_ratio=0)


def test_an_encoder_that_needs_all_tokens_is_refused():
    with pytest.raises(ValueError, match="SwinEncoder cannot: use a plain ViT, or pretrain this encoder with MixMAE"):
        tiny_mae(tiny_swin())


def test_encoding_all_tokens_is_the_plain_forward():
    encoder, images = tiny_vit(), noise_images(2)
    everything = torch.arange(36).expand(2, -1)
    torch.testing.assert_close(encoder.encode_visible(images, everything), encoder(images))
