"""Tables are resized as the official finetuning does, reports tell the truth, and poor matches are refused in time."""

import math

import pytest
import torch
from safetensors.torch import save_file

from mixmae.convert import (
    Preprocessing,
    from_mae,
    load_pretrained,
    load_weights,
    resize_bias_table,
    resize_positions,
    save_encoder,
    to_official,
)
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.layers.positions import sin_cos_positions
from tests.factories import noise_images, tiny_mixmae, tiny_pvt, tiny_swin


def cubic(values, places):
    """Bicubic interpolation along the first side, by its definition: Keys' kernel with a = -0.75, edges repeated."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows = []
    for place in places:
        first = math.floor(place) - 1
        taps = [(min(max(first + tap, 0), len(values) - 1), kernel(place - first - tap)) for tap in range(4)]
        rows.append(sum(values[index] * weight for index, weight in taps))
    return torch.stack(rows)


def resized(image, new_side):
    """(side, side, C) -> (new_side, new_side, C) with pixel centres aligned (align_corners=False)."""
    places = [(index + 0.5) * len(image) / new_side - 0.5 for index in range(new_side)]
    half = cubic(image.double(), places)
    return cubic(half.transpose(0, 1), places).transpose(0, 1)


def test_tables_are_resized_bicubically():
    """Against the definition of the interpolation, for the windows of 224 px and 384 px in stage 3 (14 and 24)."""
    torch.manual_seed(0)
    table = torch.randn(27 * 27, 3)
    expected = resized(table.view(27, 27, 3), 47).flatten(0, 1)
    torch.testing.assert_close(resize_bias_table(table, 24).double(), expected, rtol=1e-5, atol=1e-5)
    positions = sin_cos_positions(8, (7, 7))[None]
    expected = resized(positions.view(7, 7, 8), 12).flatten(0, 1)[None]
    torch.testing.assert_close(resize_positions(positions, (7, 7), (12, 12)).double(), expected, rtol=1e-5, atol=1e-5)


def small(image_size, windows):
    torch.manual_seed(1)
    return SwinEncoder(
        SwinConfig(
            image_size=image_size, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=windows
        )
    )


def test_a_larger_input_gets_resized_tables():
    made = ImageClassifier(small(96, (12, 12, 6, 3)), 10)
    model = ImageClassifier(small(160, (20, 20, 10, 5)), 10)
    report = load_weights(model, made.state_dict())
    tables = [name for name in model.state_dict() if name.endswith("relative_position_bias_table")]
    assert set(report.resized) == {"encoder.pos_embed", *tables}
    assert report.matched_share == 1.0
    state = made.state_dict()
    for name, window in zip(tables, (20, 20, 10, 10, 5), strict=True):
        assert torch.equal(model.state_dict()[name], resize_bias_table(state[name], window))
    expected = resize_positions(state["encoder.pos_embed"], (24, 24), (40, 40))
    assert torch.equal(model.encoder.pos_embed, expected)
    assert torch.isfinite(model(noise_images(1, (160, 160)))).all()


def test_tables_that_are_not_square(tmp_path, capsys):
    made = small((64, 96), (12, 12, 6, 3))
    model = small((96, 160), (12, 12, 6, 3))
    report = load_weights(model, made.state_dict())
    assert report.mismatched == ("pos_embed",)  # 384 positions: their grid is not known
    report = load_weights(model, made.state_dict(), made_for=(64, 96))
    assert report.resized == ("pos_embed",)
    assert torch.equal(model.pos_embed, resize_positions(made.pos_embed, (16, 24), (24, 40)))
    save_encoder(tmp_path / "encoder.safetensors", made, Preprocessing(image_size=(64, 96)))
    other = small((96, 160), (12, 12, 6, 3))
    load_pretrained(other, tmp_path / "encoder.safetensors")
    assert torch.equal(model.pos_embed, other.pos_embed)


def test_the_tables_of_each_stage_of_pvt_are_resized(tmp_path, capsys):
    """They are (1, H, W, C), learned, and of any shape; against the definition of the interpolation."""
    made, model = tiny_pvt(64), tiny_pvt((96, 160))
    torch.save(made.state_dict(), tmp_path / "pvt.pth")
    report = load_pretrained(model, tmp_path / "pvt.pth")
    tables = [f"stages.{stage}.pos_embed" for stage in range(4)]
    assert report.resized == tuple(f"encoder.{name}" for name in tables)
    assert report.matched_share == 1.0
    for stage, name in enumerate(tables):
        own, table = model.state_dict()[name], made.state_dict()[name]
        assert own.shape[1:3] == (96 // (4 * 2**stage), 160 // (4 * 2**stage))
        rows, columns = ([(i + 0.5) * table.shape[1] / n - 0.5 for i in range(n)] for n in own.shape[1:3])
        expected = cubic(cubic(table[0].double(), rows).transpose(0, 1), columns).transpose(0, 1)
        torch.testing.assert_close(own[0].double(), expected, rtol=1e-5, atol=1e-6)
    back = tiny_pvt(64)
    load_weights(back, made.state_dict())
    assert torch.equal(back.stages[0].pos_embed, made.stages[0].pos_embed)


def test_a_decoder_table_is_resized_too():
    model = tiny_mixmae(160)
    report = load_weights(model, tiny_mixmae(96).state_dict())
    assert report.resized == ("encoder.pos_embed", "decoder.pos_embed")
    assert report.matched_share == 1.0


def test_report_names_what_did_not_fit():
    torch.manual_seed(1)
    model, other = ImageClassifier(tiny_swin((64, 64)), 10), tiny_mixmae((96, 96))
    with torch.no_grad():
        other.encoder.norm.bias.fill_(0.5)
    report = load_weights(model, other.state_dict())
    assert report.missing == ("head.weight", "head.bias")
    assert all(name.startswith("decoder.") for name in report.unexpected)
    assert report.mismatched == ()
    assert report.resized == ("encoder.pos_embed",)
    assert report.matched_share == pytest.approx((len(report.matched) + 1) / (len(report.matched) + 3))
    assert (model.encoder.norm.bias == 0.5).all()
    assert "2 missing (head.weight, head.bias)" in str(report)


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": to_official(tiny_mixmae().state_dict())}, path)
    return path


@pytest.mark.parametrize("build", [tiny_mixmae, tiny_swin, lambda: ImageClassifier(tiny_swin(), 5)])
def test_any_model_on_the_encoder_is_filled(official, capsys, build):
    model, made = build(), tiny_mixmae().state_dict()
    for parameter in model.parameters():
        parameter.data.zero_()
    report = load_pretrained(model, official)
    assert "matched" in capsys.readouterr().out
    assert report.mismatched == ()
    encoder = getattr(model, "encoder", model)
    assert all(torch.equal(value, made[f"encoder.{name}"]) for name, value in encoder.state_dict().items())


def refused(model, path, sentence):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_architecture_is_named(tmp_path, vit_state):
    save_file(from_mae(vit_state), tmp_path / "vit.safetensors")
    refused(
        tiny_swin(), tmp_path / "vit.safetensors", "weights of a ViT of width 32 with 2 blocks; the model has a Swin"
    )
    wide = SwinEncoder(SwinConfig(image_size=96, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)))
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    refused(
        tiny_mixmae(), tmp_path / "wide.safetensors", "Swin of width 32 with 1-1-2-1 blocks; the model has a Swin of"
    )


def test_an_encoder_alone_does_not_fill_a_decoder(tmp_path):
    save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
    model = tiny_mixmae()
    refused(model, tmp_path / "encoder.safetensors", "no weights for the model's decoder, an encoder only")
    report = load_pretrained(model, tmp_path / "encoder.safetensors", allow_mismatch=True)
    assert all(name.startswith("decoder.") for name in report.missing)


def test_other_channels_are_refused(official):
    refused(tiny_swin(in_channels=1), official, r"patch_embed.proj.weight of shape \(16, 3, 4, 4\)")


def test_half_a_model_is_refused(tmp_path):
    state = {name: value for name, value in tiny_swin().state_dict().items() if "mlp" not in name}
    save_file(state, tmp_path / "half.safetensors")
    refused(tiny_swin(), tmp_path / "half.safetensors", "of the model's tensors, less than 95%")
