"""Encoder files are written whole, and come back as they were."""

import pytest
import torch

from mixmae.convert import (
    Preprocessing,
    load_encoder,
    read_state_dict,
    read_weights,
    save_encoder,
)
from mixmae.finetune.classification import ImageClassifier
from mixmae.writing import writing
from tests.factories import noise_images, tiny_mixmae, tiny_swin

PREPROCESSING = Preprocessing(image_size=(96, 96), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.mark.parametrize("model", [tiny_swin(), ImageClassifier(tiny_swin(), 7), tiny_mixmae()])
def test_an_encoder_file_is_all_that_is_needed(tmp_path, model):
    path = tmp_path / "encoder.safetensors"
    written = save_encoder(path, model, PREPROCESSING, source={"run_id": "abc", "step": 7}, data_licence="CC0")
    encoder, metadata = load_encoder(path)
    assert metadata == written
    assert (metadata.preprocessing, metadata.data_licence) == (PREPROCESSING, "CC0")
    assert metadata.source == {"run_id": "abc", "step": 7}
    assert metadata.num_classes == (7 if isinstance(model, ImageClassifier) else None)
    own = getattr(model, "encoder", model)
    assert encoder.config == own.config
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(encoder(noise_images(1)), own.eval()(noise_images(1)))
    again = tmp_path / "again.safetensors"
    save_encoder(again, encoder, metadata.preprocessing)
    names = read_state_dict(again)
    assert all(torch.equal(value, read_state_dict(path)[name]) for name, value in names.items())


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, tiny_swin(), PREPROCESSING)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        save_encoder(path, tiny_swin(), PREPROCESSING)
    with pytest.raises(OSError, match="none"), writing(path, overwrite=True) as partial:
        partial.with_name("none").rename(partial)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    save_encoder(path, ImageClassifier(tiny_swin(), 3), PREPROCESSING, overwrite=True)
    assert read_weights(path).metadata.num_classes == 3
