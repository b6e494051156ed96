"""Twins' own: its config and blocks. What all encoders promise is in tests/contract; timm's numbers in reference."""

import dataclasses

import pytest
import torch

from mixmae.encoders.twins import PositionConv, TwinsConfig, TwinsEncoder, twins_pcpvt_large, twins_svt_large
from mixmae.layers.spatial_reduction import SpatialReductionAttention
from mixmae.layers.windows import WindowAttention
from tests.factories import noise_images, tiny_pcpvt, tiny_svt


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"window_sizes": (7, 7, 7)}, "one per stage"),
        ({"window_sizes": (7, 7, 0, 7)}, "at least 1"),
        ({"sr_ratios": (8, 8, 2, 1)}, "its sr_ratio must divide 4"),
    ],
)
def test_bad_configs_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        TwinsConfig(**options)


def test_svt_alternates_windows_and_the_whole_image():
    with torch.device("meta"):
        stage = TwinsEncoder(twins_svt_large()).stages[2]
    assert [type(block.attn) for block in stage.blocks] == [WindowAttention, SpatialReductionAttention] * 9
    assert all(isinstance(block.attn, SpatialReductionAttention) for block in tiny_pcpvt().stages[2].blocks)


def test_positions_are_added_once_per_stage_after_its_first_block():
    """Without it PCPVT is blind to the order of cells: nothing else knows where a token is."""
    order, encoder, image = [], tiny_svt(), noise_images(1)
    stage = encoder.stages[0]
    for name, part in [("peg", stage.peg), *((f"block {n}", block) for n, block in enumerate(stage.blocks))]:
        part.register_forward_hook(lambda *_, name=name: order.append(name))
    encoder(image)
    assert order == ["block 0", "peg", "block 1"]
    encoder = tiny_pcpvt()
    rolled = image.roll(32, dims=3)
    with torch.no_grad():
        assert not torch.allclose(encoder(image).mean(1), encoder(rolled).mean(1), rtol=1e-3, atol=1e-3)
        for stage in encoder.stages:
            torch.nn.init.zeros_(stage.peg.proj.weight)
        torch.testing.assert_close(encoder(image).mean(1), encoder(rolled).mean(1), rtol=1e-4, atol=1e-4)


def test_peg_by_hand():
    """A kernel of ones adds to a token the sum of those around it, of its group, scaled to the whole kernel."""
    peg = PositionConv(1)
    torch.nn.init.ones_(peg.proj.weight)
    torch.nn.init.zeros_(peg.proj.bias)
    x = torch.tensor([[1.0, 2.0, 4.0]])[None, ..., None]  # one row of three
    assert peg(x, None).flatten().tolist() == [1 + 3, 2 + 7, 4 + 6]
    # Outside counts as read: two of 9 places are lost at the border between the groups, in the middle row only.
    grouped = peg(x, torch.tensor([[[0, 0, 1]]])).flatten()
    torch.testing.assert_close(grouped, torch.tensor([1 + 3.0, 2 + 3 * 9 / 8, 4 + 4 * 9 / 8]))


@pytest.mark.parametrize("size", [twins_pcpvt_large, twins_svt_large])
@pytest.mark.parametrize(("height", "width"), [(384, 384), (512, 768)])
def test_known_sizes_take_other_images(size, height, width):
    config = dataclasses.replace(size(), depths=(2, 2, 2, 2))
    with torch.device("meta"):
        tokens = TwinsEncoder(config)(torch.empty(2, 3, height, width))
        assert tokens.shape == (2, height // 32 * width // 32, config.embed_dims[-1])


def test_depths_by_hand():
    """Stages of 2, 1, 2, 2 blocks."""
    depths = tiny_svt().parameter_depths()
    assert [depths[f"stages.{stage}.peg.proj.weight"] for stage in range(4)] == [1, 3, 4, 6]
    assert [depths[f"stages.{stage}.patch_embed.proj.weight"] for stage in range(4)] == [0, 3, 4, 6]
    assert depths["norm.bias"] == 7
