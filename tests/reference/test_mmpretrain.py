"""The numbers of mmpretrain's port of MixMIM, to 1e-5 relative in float32 (golden/README.md)."""

import torch

from mixmae.convert import config_from_mmpretrain, from_mmpretrain, load_weights, to_mmpretrain
from mixmae.encoders.swin import SwinEncoder
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from tests.reference.test_official_mixmim import assert_close, read

NAME = "mmpretrain_tiny_pretrain.safetensors"


def test_encoded_reconstructed_and_pooled():
    golden, weights = read(NAME, prefix="state_dict.")
    configs = config_from_mmpretrain(weights, decoder_num_heads=4)
    method = MixMAE(SwinEncoder(configs.encoder), MixMAEConfig(num_images=2, decoder=configs.decoder))
    report = load_weights(method, from_mmpretrain(weights))
    assert report.matched_share == 1.0
    assert not report.unexpected
    batch = len(golden["input"])
    index = torch.arange(batch)
    group_map, partners = golden["mask"].view(1, 3, 3).long(), torch.stack([index, index.flip(0)], dim=1)
    with torch.no_grad():
        mixed = method.mix(golden["input"], method.draw(golden["input"], None, group_map, partners))
        encoded = method.encode(mixed)
        predicted, _ = method.decode(encoded, mixed)  # (4, 2, 9, 3072)
        pooled = method.encoder(golden["input"]).mean(dim=1)
    assert_close(encoded, golden["encoded"])
    assert_close(predicted.transpose(0, 1).flatten(0, 1), golden["reconstructed"])
    assert_close(pooled, golden["features_unmasked"])


def test_weights_come_back_identical():
    weights = read(NAME, prefix="state_dict.")[1]
    back = to_mmpretrain(from_mmpretrain(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
