"""The decoder must not see what a sequence hides."""

import pytest
import torch

from mixmae.decoders import DecoderConfig, PixelDecoder
from mixmae.mixing import hidden_mask
from tests.factories import group_maps


def tiny_decoder():
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, depth=2, num_heads=2)
    return PixelDecoder(encoder_dim=8, patch_px=4, channels=2, grid=(3, 3), config=config)


def test_hidden_tokens_of_a_sequence_are_not_read():
    decoder, mask = tiny_decoder(), hidden_mask(group_maps(2), 4).flatten(2)
    tokens = torch.randn(2, 9, 8)
    before = decoder(tokens, mask, (3, 3))
    assert before.shape == (2, 4, 9, 32)
    for group in range(4):
        changed = torch.where(mask[:, group, :, None], torch.randn(2, 9, 8), tokens)
        after = decoder(changed, mask, (3, 3))
        assert torch.equal(after[:, group], before[:, group])
        assert not torch.equal(after, before)


def test_sequences_are_decoded_one_by_one():
    decoder, mask = tiny_decoder(), hidden_mask(group_maps(1), 4).flatten(2)
    tokens = torch.randn(3, 9, 8)
    together = decoder(tokens, mask, (3, 3))
    for group in range(4):
        alone = decoder(tokens[1:2], mask[:, group : group + 1], (3, 3))
        torch.testing.assert_close(alone[0, 0], together[1, group])


@pytest.mark.parametrize("options", [{"dim": 24, "num_heads": 5}, {"dim": 18, "num_heads": 2}, {"depth": 0}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="must be"):
        DecoderConfig(**options)


def test_chosen_tokens_alone_are_those_of_all():
    torch.manual_seed(0)
    config = DecoderConfig(dim=8, depth=1, num_heads=2)
    decoder = PixelDecoder(encoder_dim=8, patch_px=2, channels=3, grid=(3, 3), config=config)
    tokens, mask = torch.randn(2, 9, 8), hidden_mask(group_maps(), 4).flatten(2)
    chosen = torch.tensor([71, 3, 40])
    every = decoder(tokens, mask, (3, 3)).flatten(0, 2)
    torch.testing.assert_close(decoder(tokens, mask, (3, 3), chosen), every[chosen])
