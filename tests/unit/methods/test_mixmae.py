"""The objective: what is compared with what, and that nothing hidden leaks into a prediction."""

import pytest
import torch

from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.mixing import cyclic_partners, hidden_mask, mix, upsample_group_map
from mixmae.patches import normalise_patches, patchify
from tests.factories import DECODER, group_maps, noise_images, seeded, tiny_mixmae, tiny_swin, tiny_vit

EVERY_K = pytest.mark.parametrize("num_images", [2, 3, 4, 5])


def predict(method, images, group_map, partners):
    mixed = method.mix(images, method.draw(images, None, group_map, partners))
    return method.decode(method.encode(mixed), mixed)[0]


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


def test_one_map_per_sample_or_per_batch():
    images = noise_images(8)
    per_batch = tiny_mixmae(group_map_per="batch")(images, generator=seeded(), with_pictures=True)
    per_sample = tiny_mixmae(group_map_per="sample")(images, generator=seeded(), with_pictures=True)
    assert per_batch.pictures["group_map"].shape == (1, 3, 3)
    maps = per_sample.pictures["group_map"]
    assert maps.shape == (8, 3, 3)
    assert len(maps.unique(dim=0)) > 1
    for pictures in (per_batch.pictures, per_sample.pictures):
        assert torch.equal(pictures["mixed"], mix(images, pictures["group_map"], pictures["partners"]))


def test_equal_maps_per_sample_are_the_shared_map():
    method, images, group_map = tiny_mixmae(), noise_images(8), group_maps()
    shared = method(images, group_map=group_map).loss
    torch.testing.assert_close(method(images, group_map=group_map.expand(8, -1, -1)).loss, shared)


def test_unmasked_attention_differs():
    images, group_map = noise_images(4), group_maps()
    masked = tiny_mixmae(unmixing="attention")(images, group_map=group_map).loss
    unmasked = tiny_mixmae(unmixing="none")(images, group_map=group_map).loss
    assert not torch.isclose(masked, unmasked, rtol=1e-6)


def test_bad_inputs_name_the_remedy():
    method, images = tiny_mixmae(), noise_images(4)
    with pytest.raises(ValueError, match="multiple of 4, for example 4 or 8"):
        method(noise_images(6), generator=seeded())
    with pytest.raises(ValueError, match="the group map has 7 x 7 cells"):
        method(images, group_map=group_maps(grid=(7, 7)))
    with pytest.raises(ValueError, match=r"\(M, 4\)"):
        method(images, generator=seeded(), partners=cyclic_partners(4, 2))
    with pytest.raises(ValueError, match="larger images, smaller cells, or mix fewer"):
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
    with pytest.raises(ValueError, match="set unmixing='none'"):
        MixMAE(encoder, MixMAEConfig())
    with pytest.raises(ValueError, match="would cut the encoder's last tokens of 32 px"):
        tiny_mixmae(cell_px=48)
    with pytest.raises(ValueError, match="multiples of 64 px, got 96 x 96"):
        tiny_mixmae(cell_px=64)
    with pytest.raises(ValueError, match="Swin does"):
        MixMAE(tiny_vit(), MixMAEConfig(unmixing="embedding"))
    with pytest.raises(ValueError, match="all fills would be the same; set unmixing='none'"):
        MixMAEConfig(fill="shuffle")
    with pytest.raises(ValueError, match="all fills would be the same"):
        MixMAEConfig(fill="zero", unmixing="both")
    with pytest.raises(ValueError, match="mixes no images"):
        MixMAEConfig(fill="zero", unmixing="none", pairing="once")
    with pytest.raises(ValueError, match="'mix', 'zero', 'learnable', 'shuffle' or 'zoom'"):
        MixMAEConfig(fill="noise")
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        MixMAEConfig(mask_token_share=1.0)
    with pytest.raises(ValueError, match="larger images, smaller cells, or mix fewer"):
        tiny_mixmae(mask_token_share=0.8)(noise_images(4), generator=seeded())


def test_zeros_that_nothing_sees_are_mae_on_a_pyramid():
    """fill="zero" with masked attention: the visible cells are encoded as if there were no others."""
    method = tiny_mixmae(num_images=2, fill="zero")
    images, group_map, partners = noise_images(4), group_maps(num_images=2), cyclic_partners(4, 1)
    visible = group_map.flatten() == 0
    alone = method.encode(method.mix(images, method.draw(images, None, group_map, partners)))[:, visible]
    mixed = tiny_mixmae(num_images=2)
    beside = mixed.encode(mixed.mix(images, mixed.draw(images, None, group_map)))[:, visible]
    torch.testing.assert_close(alone, beside)  # the same weights: what fills the hidden cells does not matter


def test_mask_tokens_beside_two_images():
    """The paper's "2 w/ [MASK] (0.75)": each of two images shows a quarter, half of the cells hold the mask token."""
    method = tiny_mixmae(image_size=128, num_images=2, mask_token_share=0.5)
    assert method.config.mask_ratio == 0.75
    images = noise_images(4, (128, 128))
    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    assert [int((pictures["group_map"] == group).sum()) for group in range(3)] == [4, 4, 8]
    assert pictures["partners"].shape == (4, 2)
    grey = (patchify(pictures["mixed"], 32).abs().amax(dim=2) == 0).view(4, 4, 4)
    assert torch.equal(grey, (pictures["group_map"] == 2).expand(4, -1, -1))
    method(images, generator=seeded()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    # With masked attention a mask token tells the images nothing, whatever it is.
    hidden_before = method(images, generator=seeded()).loss
    with torch.no_grad():
        method.mask_token += torch.randn(16, generator=seeded(9))
    assert torch.equal(method(images, generator=seeded()).loss, hidden_before)
    free = tiny_mixmae(image_size=128, num_images=2, mask_token_share=0.5, unmixing="none")
    before = free(images, generator=seeded()).loss
    with torch.no_grad():
        free.mask_token += torch.randn(16, generator=seeded(9))
    assert not torch.equal(free(images, generator=seeded()).loss, before)


def test_without_dual_reconstruction_only_the_first_image_counts():
    images, group_map = noise_images(8), group_maps(num_images=4)
    both, first = tiny_mixmae(), tiny_mixmae(dual=False)
    pictures = first(images, group_map=group_map, with_pictures=True).pictures
    assert pictures["partners"].tolist() == cyclic_partners(8, 4)[:, :1].tolist()
    predicted = predict(both, images, group_map, cyclic_partners(8, 4))[:, :1]  # the same weights
    target = both.targets(images).patches[pictures["partners"]]
    hidden = hidden_mask(group_map, 1).flatten(2).expand(8, -1, -1)
    expected = both.reconstruction_loss(predicted[hidden], target[hidden])
    torch.testing.assert_close(first(images, group_map=group_map).loss, expected)


def test_mix_embeddings_tell_groups_apart_at_every_stage():
    images, group_map = noise_images(4), group_maps()
    method = tiny_mixmae(unmixing="embedding")
    assert [tuple(p.shape) for p in method.mix_embeddings] == [(4, 16), (4, 32), (4, 64), (4, 128)]
    method(images, group_map=group_map).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.mix_embeddings)
    before = method(images, group_map=group_map).loss
    for vectors in method.mix_embeddings:
        kept = vectors.detach().clone()
        with torch.no_grad():
            vectors[2] += torch.randn(vectors.shape[1], generator=seeded(9))  # a constant would go in the norm
        assert not torch.equal(method(images, group_map=group_map).loss, before)
        with torch.no_grad():
            vectors.copy_(kept)
    # With all embeddings zero it is the model without unmixing.
    with torch.no_grad():
        for vectors in method.mix_embeddings:
            vectors.zero_()
    plain = tiny_mixmae(unmixing="none")
    plain.load_state_dict({name: value for name, value in method.state_dict().items() if "mix_emb" not in name})
    assert torch.equal(plain(images, group_map=group_map).loss, method(images, group_map=group_map).loss)


def test_mix_embeddings_do_not_break_the_isolation_of_masked_attention():
    method = tiny_mixmae(unmixing="both")
    images, partners, group_map = noise_images(4), cyclic_partners(4, 4), group_maps()
    before = predict(method, images, group_map, partners)
    changed = images.clone()
    changed[partners[0, 2]] += 5.0
    after = predict(method, changed, group_map, partners)
    assert torch.equal(after[0, 1], before[0, 1])
    assert not torch.equal(after[0, 2], before[0, 2])


def test_pairing_once_mixes_each_image_once():
    images = noise_images(8)
    once = tiny_mixmae(pairing="once", group_map_per="sample")
    pictures = once(images, generator=seeded(), with_pictures=True).pictures
    assert pictures["partners"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pictures["mixed"].shape[0] == pictures["group_map"].shape[0] == 2
    part = once(images[4:], generator=seeded(), first_sample=4, with_pictures=True).pictures
    assert torch.equal(part["group_map"], pictures["group_map"][1:])
    torch.testing.assert_close(part["mixed"], pictures["mixed"][1:])


def test_a_vit_has_four_tokens_per_cell():
    """Patches of 16 px: the loss is over the patches of hidden cells, each predicted by its own token."""
    torch.manual_seed(0)
    method = MixMAE(tiny_vit(), MixMAEConfig(num_images=2, decoder=DECODER))
    images, group_map = noise_images(4), group_maps(num_images=2)
    pictures = method(images, group_map=group_map, with_pictures=True).pictures
    assert pictures["reconstructions"].shape == (4, 2, 3, 96, 96)
    predicted = predict(method, images, group_map, cyclic_partners(4, 2))
    hidden = hidden_mask(upsample_group_map(group_map, (6, 6)), 2).flatten(2)
    target = normalise_patches(patchify(images, 16)).patches[cyclic_partners(4, 2)]
    errors = (predicted - target).square().mean(dim=3)
    expected = errors[hidden.expand_as(errors)].mean()
    torch.testing.assert_close(method(images, group_map=group_map).loss, expected)
