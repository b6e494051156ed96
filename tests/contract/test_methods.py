"""What every objective promises (mixmae/methods). A new objective is a line in METHODS.

What makes each one itself (which cells it hides, how it weighs them, its fills) is in tests/unit/methods.
"""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.mixing import hidden_mask, upsample_group_map
from mixmae.patches import target_patches
from tests.factories import (
    DECODER,
    noise_images,
    seeded,
    small_pvt,
    small_swin,
    small_vit,
    swin_of_pixels,
    tiny_mae,
    tiny_mixmae,
    tiny_resnetv2,
    tiny_simmim,
    tiny_swin,
    tiny_vit,
)


def mixmae_on(encoder):
    return lambda *size, in_channels=3, **options: MixMAE(
        encoder(*size, in_channels=in_channels), MixMAEConfig(decoder=DECODER, **options)
    )


def simmim_on(encoder):
    return lambda *size, in_channels=3, **options: tiny_simmim(encoder(*size, in_channels=in_channels), **options)


def mae_on(encoder):
    return lambda *size, in_channels=3, **options: tiny_mae(encoder(*size, in_channels=in_channels), **options)


def with_options(build, **fixed):
    return lambda *size, **options: build(*size, **fixed, **options)


METHODS = {
    "mixmae": tiny_mixmae,
    "mixmae_2_per_sample": with_options(tiny_mixmae, num_images=2, group_map_per="sample"),
    "mixmae_once": with_options(tiny_mixmae, num_images=2, pairing="once", group_map_per="sample"),
    "mixmae_first_alone": with_options(tiny_mixmae, dual=False),
    "mixmae_zeros": with_options(tiny_mixmae, num_images=2, fill="zero"),
    "mixmae_vit": with_options(mixmae_on(tiny_vit), num_images=2),
    "mixmae_small_swin": mixmae_on(small_swin),
    "mixmae_small_swin_large_cells": with_options(mixmae_on(small_swin), num_images=2, cell_px=8),
    "mixmae_of_pixels": mixmae_on(swin_of_pixels),
    "mixmae_small_pvt": with_options(mixmae_on(small_pvt), num_images=2),
    "mixmae_small_vit_cells_of_a_patch": with_options(mixmae_on(small_vit), cell_px=4),
    "simmim": simmim_on(tiny_swin),
    "simmim_vit": simmim_on(tiny_vit),
    "simmim_resnetv2": simmim_on(tiny_resnetv2),
    "simmim_small_swin_large_cells": with_options(simmim_on(small_swin), cell_px=8),
    "mae": mae_on(tiny_vit),
    "mae_cells_of_4_patches": with_options(mae_on(small_vit), cell_px=8),
}
every_method = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)


def images_for(method, batch=4):
    return noise_images(batch, method.encoder.image_size, method.encoder.in_channels)


def given(method, pictures):
    """The map or mask of some pictures as an argument of the method's forward."""
    group_map = pictures["group_map"]
    return {"group_map": group_map} if isinstance(method, MixMAE) else {"mask": group_map == 1}


@every_method
@pytest.mark.parametrize(("grid", "channels"), [((3, 5), 1), ((7, 10), 5), ((8, 8), 3), ((2, 3), 3)])
def test_loss_and_pictures_at_any_size(build, grid, channels):
    method = build(in_channels=channels)  # built for another size
    size = (grid[0] * method.cell_px, grid[1] * method.cell_px)
    images = noise_images(4, size, channels)
    assert not method(images, generator=seeded()).pictures
    step = method(images, generator=seeded(), with_pictures=True)
    step.loss.backward()
    assert step.loss.dtype == torch.float32
    assert torch.isfinite(step.loss)
    drawn = {"reconstructions", "zero_predictions"} if method.config.normalise_targets else {"reconstructions"}
    assert set(step.pictures) == {"originals", "mixed", *drawn, "group_map", "partners"}
    assert not any(picture.requires_grad for picture in step.pictures.values())
    num_mixes, num_reconstructed = step.pictures["partners"].shape
    assert torch.equal(step.pictures["originals"], images)
    assert step.pictures["mixed"].shape == (num_mixes, channels, *size)
    for name in drawn:
        assert step.pictures[name].shape == (num_mixes, num_reconstructed, channels, *size)
    group_map = step.pictures["group_map"]
    assert group_map.dtype == torch.int64
    assert len(group_map) in (1, num_mixes)
    assert group_map.shape[1:] == grid


@every_method
def test_every_parameter_learns(build):
    method = build()
    method(images_for(method, 8), generator=seeded()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_method
def test_the_generator_decides_and_a_given_map_takes_its_place(build):
    method = build()
    images = images_for(method)
    drawn = method(images, generator=seeded(3), with_pictures=True)
    assert torch.equal(method(images, generator=seeded(3)).loss, drawn.loss)
    assert torch.equal(method(images, **given(method, drawn.pictures)).loss, drawn.loss)
    assert not torch.equal(method(images, generator=seeded(4)).loss, drawn.loss)


@every_method
def test_parts_of_a_batch_are_the_whole(build):
    """The same maps and pixels, reconstructions as close as other batch sizes allow, and the loss is the mean."""
    method = build().eval()
    images = images_for(method, 8)
    whole = method(images, generator=seeded(), with_pictures=True)
    losses, done = [], 0
    for part in (images[:4], images[4:]):
        first = len(part) * len(losses)
        step = method(part, generator=seeded(), first_sample=first, with_pictures=True)
        mixes = slice(done, done := done + len(step.pictures["partners"]))
        losses.append(step.loss)
        maps = whole.pictures["group_map"]
        assert torch.equal(step.pictures["group_map"], maps if len(maps) == 1 else maps[mixes])
        assert torch.equal(step.pictures["partners"] + first, whole.pictures["partners"][mixes])
        assert torch.equal(step.pictures["mixed"], whole.pictures["mixed"][mixes])
        expected = whole.pictures["reconstructions"][mixes]
        torch.testing.assert_close(step.pictures["reconstructions"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(losses).mean(), whole.loss)


@every_method
@pytest.mark.parametrize("normalise", [False, True])
@torch.no_grad()
def test_only_what_an_image_shows_reaches_its_reconstruction(build, normalise):
    """Not one bit of its hidden pixels does; of the visible ones it must, or the first half could not fail."""
    method = build(normalise_targets=normalise)
    images = images_for(method)
    names = ("reconstructions", "zero_predictions") if normalise else ("reconstructions",)

    def hidden_parts(images):
        pictures = method(images, generator=seeded(), with_pictures=True).pictures
        groups = upsample_group_map(pictures["group_map"], method.encoder.image_size)
        hidden = hidden_mask(groups, pictures["partners"].shape[1])
        return torch.stack([pictures[name] * hidden[:, :, None] for name in names])

    pictures = method(images, generator=seeded(), with_pictures=True).pictures
    groups = upsample_group_map(pictures["group_map"], method.encoder.image_size)[0]
    before = hidden_parts(images)
    for group, image in enumerate(pictures["partners"][0].tolist()):
        for pixels, reaches in ((groups != group, False), (groups == group, True)):
            changed = images.clone()
            changed[image] += 5.0 * pixels
            after = hidden_parts(changed)
            assert all(
                torch.equal(a, b) != reaches for a, b in zip(after[:, 0, group], before[:, 0, group], strict=True)
            )


@every_method
@pytest.mark.parametrize("normalise", [False, True])
def test_perfect_predictions_reconstruct_the_originals(monkeypatch, build, normalise):
    size = (3 * build().cell_px, 5 * build().cell_px)
    method, images = build(size, normalise_targets=normalise), noise_images(8, size)
    target, decode = method.targets(images).patches, method.decode

    def perfect(encoded, drawn):
        predicted, hidden = decode(encoded, drawn)
        wanted = target[drawn.partners] if isinstance(method, MixMAE) else target
        assert wanted.shape == predicted.shape
        return wanted, hidden

    monkeypatch.setattr(method, "decode", perfect)
    if isinstance(method, MixMAE):
        monkeypatch.setattr(
            method, "decode_hidden", lambda encoded, mixed: method.hidden_targets(method.targets(images), mixed)
        )
    step = method(images, generator=seeded(), with_pictures=True)
    assert step.loss.item() == 0.0
    expected, made = images[step.pictures["partners"]], step.pictures["reconstructions"]
    if normalise:  # brightness and contrast of hidden patches are not the original's: normalised, they are
        px = round((size[0] * size[1] / target.shape[1]) ** 0.5)
        expected, made = (
            target_patches(pixels.flatten(0, 1), px, normalise=True).patches for pixels in (expected, made)
        )
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4 if normalise else 1e-5)


@every_method
def test_mixed_precision_keeps_the_loss_in_float32(build):
    method = build()
    images = images_for(method)
    exact = method(images, generator=seeded()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(images, generator=seeded()).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("name", ["mixmae_2_per_sample", "simmim", "mae"])
def test_learns_to_overfit_a_batch(name):
    method = METHODS[name](normalise_targets=name.startswith("mixmae"))
    images = noise_images(2) * 0.1 + torch.linspace(-2, 2, 96)  # a ramp in every image: easy to learn
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method(images, generator=seeded()).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@every_method
def test_bad_inputs_name_the_remedy(build):
    method = build()
    images, (height, width), cell_px = images_for(method), method.encoder.image_size, method.cell_px
    sizes = f"got {height + 1} x {width}; use for example {height} x {width}"
    with pytest.raises(ValueError, match=f"multiples of {cell_px} px, {sizes}"):
        method(noise_images(4, (height + 1, width)), generator=seeded())
    stride = method.encoder.strides[-1]
    if cell_px > stride:
        with pytest.raises(ValueError, match=f"multiples of {cell_px} px"):
            build(height + stride)
    with pytest.raises(ValueError, match=f"cell of {cell_px + 1} px .* make cell_px a multiple"):
        type(method)(method.encoder, dataclasses.replace(method.config, cell_px=cell_px + 1))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        method(noise_images(4, channels=1), generator=seeded())
    with pytest.raises(ValueError, match="normalised floats"):
        method(images.to(torch.uint8), generator=seeded())
    with pytest.raises(ValueError, match="pass generator="):
        method(images)


@every_method
def test_a_batch_of_as_many_images_as_mix_is_enough(build):
    method = build()
    mixed = method.config.images_mixed
    assert "images_mixed" not in {field.name for field in dataclasses.fields(method.config)}  # never written to a run
    assert torch.isfinite(method(images_for(method, mixed), generator=seeded()).loss)
    if mixed > 1:
        with pytest.raises(ValueError, match=f"multiple of {mixed}"):
            method(images_for(method, mixed + 1), generator=seeded())


class Waits(TorchDispatchMode):
    """Keeps the operations for which the host of a GPU waits, because a number of theirs decides what follows."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in pytree.tree_leaves(args[1:])
        )
        if by_mask or name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@every_method
def test_after_the_draws_the_host_of_a_gpu_waits_for_nothing(monkeypatch, build):
    method = build()
    images = images_for(method)
    drawn = method.draw(images, seeded())
    monkeypatch.setattr(method, "draw", lambda *_: drawn)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # a CPU sorts windows by sizes that it reads
    with Waits() as waits:
        method(images, generator=seeded()).loss.backward()
    assert waits.found == []
    with Waits() as waits:
        images[images > 0].sum().item()  # it would be seen
    assert waits.found == ["index", "_local_scalar_dense"]


@every_method
def test_all_but_the_draws_is_one_graph(build):
    """Compiled, and not compiled anew from step to step: the draws change, the shapes do not."""
    method, plain, graphs = build(), build(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    method.compile(backend=backend)
    images = images_for(method)
    for seed in range(4):
        expected = plain(images, generator=seeded(seed)).loss
        torch.testing.assert_close(method(images, generator=seeded(seed)).loss, expected)
    # Where one image alone is reconstructed, its hidden cells are some more or fewer: a second graph is for any number.
    first_alone = isinstance(method, MixMAE) and (method.config.fill != "mix" or not method.config.dual)
    assert len(graphs) <= 1 + first_alone
