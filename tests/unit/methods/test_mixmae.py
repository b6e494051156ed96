"""The objective: what is compared with what, and that nothing hidden leaks into a prediction."""

import pytest
import torch

from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.mixing import cyclic_partners, hidden_mask, mix
from mixmae.patches import patchify
from tests.factories import group_maps, noise_images, seeded, tiny_mixmae, tiny_swin

EVERY_K = pytest.mark.parametrize("num_images", [2, 3, 4, 5])


def predict(method, images, group_map, partners):
    encoded = method.encode(mix(images, group_map, partners), group_map)
    return method.decoder(
        encoded, hidden_mask(group_map, method.config.num_images).flatten(2), tuple(group_map.shape[1:])
    )


@EVERY_K
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_loss_is_the_mean_over_hidden_cells(num_images, per):
    """Against loops over mixes, images and cells, with the targets worked out anew."""
    method = tiny_mixmae(num_images=num_images)
    batch = 2 * num_images
    images, partners = noise_images(batch), cyclic_partners(batch, num_images)
    group_map = group_maps(1 if per == "batch" else batch, num_images=num_images)
    predicted = predict(method, images, group_map, partners)
    errors = []
    for m in range(batch):
        cells = group_map[m % len(group_map)].flatten()
        for k in range(num_images):
            patches = patchify(images[partners[m, k]][None], 32)[0]
            for cell in range(9):
                if cells[cell] != k:
                    patch = patches[cell]
                    target = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5
                    errors.append((predicted[m, k, cell] - target).square().mean())
    loss = method(images, group_map=group_map, partners=partners).loss
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@EVERY_K
def test_a_hidden_pixel_does_not_reach_its_own_prediction(num_images):
    """The pixels that an image does not show in a mix change nothing that the mix says about the image."""
    method = tiny_mixmae(num_images=num_images)
    images, partners = noise_images(num_images), cyclic_partners(num_images, num_images)
    group_map = group_maps(num_images, num_images=num_images)
    before = predict(method, images, group_map, partners)
    for k in range(num_images):
        pixels = hidden_mask(group_map, num_images)[0, k].repeat_interleave(32, 0).repeat_interleave(32, 1)
        changed = images.clone()
        changed[partners[0, k]] += 5.0 * pixels  # hidden cells of the k-th image of mix 0
        after = predict(method, changed, group_map, partners)
        assert torch.equal(after[0, k], before[0, k])
        assert not torch.equal(after, before)  # other mixes show some of these cells


def test_default_partners_and_map():
    method, images = tiny_mixmae(), noise_images(8)
    drawn = method(images, generator=seeded(3)).loss
    given = method(images, group_map=group_maps(seed=3), partners=cyclic_partners(8, 4)).loss
    assert torch.equal(drawn, given)
    assert not torch.equal(drawn, method(images, generator=seeded(4)).loss)


def test_one_map_a_sample_or_a_batch():
    images = noise_images(8)
    per_batch = tiny_mixmae(group_map_per="batch")(images, generator=seeded(), with_pictures=True)
    per_sample = tiny_mixmae(group_map_per="sample")(images, generator=seeded(), with_pictures=True)
    assert per_batch.pictures["group_map"].shape == (1, 3, 3)
    maps = per_sample.pictures["group_map"]
    assert maps.shape == (8, 3, 3)
    assert len(maps.unique(dim=0)) > 1


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_parts_of_a_batch_get_the_maps_of_the_whole(per):
    images = noise_images(8)
    model = tiny_mixmae(group_map_per=per).eval()
    whole = model(images, generator=seeded(), with_pictures=True).pictures
    second = model(images[4:], generator=seeded(), first_sample=4, with_pictures=True).pictures
    torch.testing.assert_close(second["mixed"], whole["mixed"][4:])
    torch.testing.assert_close(second["reconstructions"], whole["reconstructions"][4:], rtol=1e-4, atol=1e-5)


def test_equal_maps_a_sample_are_the_shared_map():
    method, images, group_map = tiny_mixmae(), noise_images(8), group_maps()
    shared = method(images, group_map=group_map).loss
    torch.testing.assert_close(method(images, group_map=group_map.expand(8, -1, -1)).loss, shared)


def test_unmasked_attention_differs():
    images, group_map = noise_images(4), group_maps()
    masked = tiny_mixmae(masked_attention=True)(images, group_map=group_map).loss
    unmasked = tiny_mixmae(masked_attention=False)(images, group_map=group_map).loss
    assert not torch.isclose(masked, unmasked, rtol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_perfect_predictions_reconstruct_the_originals(monkeypatch, normalise):
    """The loss is zero and the pictures are the images, cell by cell and mix by mix."""
    method, images = tiny_mixmae((96, 160), normalise_targets=normalise), noise_images(8, (96, 160))
    partners = cyclic_partners(8, 4)
    target = method.targets(images).patches[partners]
    monkeypatch.setattr(method.decoder, "forward", lambda *_: target)
    step = method(images, generator=seeded(), with_pictures=True)
    assert step.loss.item() == 0.0
    torch.testing.assert_close(step.pictures["reconstructions"], images[partners], rtol=1e-5, atol=1e-5)
    assert torch.equal(step.pictures["originals"], images)
    assert torch.equal(step.pictures["mixed"], mix(images, step.pictures["group_map"], step.pictures["partners"]))


def test_pictures_are_detached_and_only_on_demand():
    method, images = tiny_mixmae(), noise_images(4)
    assert not method(images, generator=seeded()).pictures
    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    assert set(pictures) == {"originals", "mixed", "reconstructions", "group_map", "partners"}
    assert not any(picture.requires_grad for picture in pictures.values())


@pytest.mark.parametrize(("size", "channels"), [((96, 160), 1), ((224, 320), 5), ((256, 256), 3), ((64, 64), 3)])
def test_odd_sizes_and_channels(size, channels):
    method = tiny_mixmae(in_channels=channels)  # built for 96 px
    step = method(noise_images(4, size, channels), generator=seeded(), with_pictures=True)
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert step.pictures["reconstructions"].shape == (4, 4, channels, *size)


def test_every_parameter_learns():
    method = tiny_mixmae()
    method(noise_images(8), generator=seeded()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_mixed_precision_keeps_the_loss_in_float32():
    method, images, group_map = tiny_mixmae(), noise_images(4), group_maps()
    exact = method(images, group_map=group_map).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(images, group_map=group_map).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


def test_learns_to_overfit_a_batch():
    method, images, group_map = tiny_mixmae(num_images=2), noise_images(2) * 0.1, group_maps(num_images=2)
    images = images + torch.linspace(-2, 2, 96)  # a ramp in every image: easy to learn
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method(images, group_map=group_map).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_bad_inputs_name_the_remedy():
    method, images = tiny_mixmae(), noise_images(4)
    with pytest.raises(ValueError, match="multiple of 4, for example 4 or 8"):
        method(noise_images(6), generator=seeded())
    with pytest.raises(ValueError, match="multiples of 32 px, got 100 x 96; use for example 96 x 96"):
        method(noise_images(4, (100, 96)), generator=seeded())
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        method(noise_images(4, channels=1), generator=seeded())
    with pytest.raises(ValueError, match="normalised floats"):
        method(images.to(torch.uint8), generator=seeded())
    with pytest.raises(ValueError, match="pass generator="):
        method(images)
    with pytest.raises(ValueError, match="the group map has 7 x 7 cells"):
        method(images, group_map=group_maps(grid=(7, 7)))
    with pytest.raises(ValueError, match=r"\(M, 4\)"):
        method(images, generator=seeded(), partners=cyclic_partners(4, 2))
    with pytest.raises(ValueError, match="larger images or mix fewer"):
        method(noise_images(4, (32, 96)), generator=seeded())


def test_an_image_may_not_mix_with_itself():
    method, images = tiny_mixmae(num_images=2), noise_images(3)
    reversed_batch = torch.tensor([[0, 2], [1, 1], [2, 0]])  # the official pairing of an odd batch
    with pytest.raises(ValueError, match="same image twice"):
        method(images, generator=seeded(), partners=reversed_batch)


def test_bad_configs():
    with pytest.raises(ValueError, match="2, 3, 4 or 5"):
        MixMAEConfig(num_images=6)
    with pytest.raises(ValueError, match="'batch' or 'sample'"):
        MixMAEConfig(group_map_per="image")
    encoder = tiny_swin()
    encoder.group_isolation = "none"
    with pytest.raises(ValueError, match="masked_attention=False"):
        MixMAE(encoder, MixMAEConfig())
    encoder.strides = (4, 8, 16)
    with pytest.raises(ValueError, match="last stride is 16"):
        MixMAE(encoder, MixMAEConfig())
