"""Trained models as they are loaded to look at images."""

import numpy as np
import pytest
import torch

from mixmae.convert import Preprocessing, digest_of, save_encoder
from mixmae.data.broken import NothingDecodes
from mixmae.data.sources import open_source
from mixmae.finetune.classification import ImageClassifier
from mixmae.inference import Embedder, ahead, choose_device, load_classifier, load_frozen
from tests.factories import tiny_swin


@pytest.fixture
def saved(tmp_path):
    """Writes a classifier of four classes with this source of the metadata, and returns its file and itself."""

    def save(source: dict | None = None):
        model = ImageClassifier(tiny_swin(64), 4)
        path = tmp_path / "classifier.safetensors"
        save_encoder(path, model, Preprocessing(image_size=(64, 64)), source=source or {}, overwrite=True)
        return path, model

    return save


@pytest.mark.parametrize("name", ["crop_pct", "resize_share"])
def test_the_margin_of_a_classifier_is_its_runs(saved, name):
    path, _ = saved({"config": {name: 0.9}})
    assert load_classifier(path, device="cpu").crop_pct == 0.9
    assert load_classifier(path, device="cpu", crop_pct=1.0).crop_pct == 1.0
    path, _ = saved()
    assert load_classifier(path, device="cpu").crop_pct == 0.875


def test_classes_without_names_are_called_by_their_index(saved):
    path, _ = saved()
    assert load_classifier(path, device="cpu").name_of(3) == "3"
    path, _ = saved({"classes": ["ant", "bee", "cat", "dog"]})
    assert load_classifier(path, device="cpu").name_of(3) == "dog"


def test_logits_and_features_do_not_depend_on_the_batch(saved, shards):
    path, model = saved()
    source = open_source(shards("set", [0, 1, 2, 3, 0]))
    found = [load_classifier(path, device="cpu", batch_size=size).logits(source) for size in (2, 5)]
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-4, atol=1e-7)
    assert found[0].labels.tolist() == [0, 1, 2, 3, 0]
    frozen = [load_frozen(path, device="cpu", batch_size=size) for size in (2, 5)]
    features = [item.features(source) for item in frozen]
    torch.testing.assert_close(features[0].values, features[1].values, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.head(features[0].values), found[0].values, rtol=1e-4, atol=1e-7)


def test_broken_images_are_named_and_in_no_figure(saved, shards, capsys):
    path, _ = saved()
    labels = [0, 1, 2, 3, 0]
    broken, whole = open_source(shards("broken", labels, broken=2)), open_source(shards("whole", labels))
    classifier, frozen = load_classifier(path, device="cpu", batch_size=2), load_frozen(path, device="cpu")
    for look in (classifier.logits, frozen.features):
        found, expected = look(broken), look(whole)
        torch.testing.assert_close(found.values, expected.values[2:], rtol=1e-4, atol=1e-6)
        assert (found.rows.tolist(), found.labels.tolist()) == ([2, 3, 4], [2, 3, 0])
        assert [record.row for record in found.broken] == [0, 1]
        assert expected.broken == ()
    assert "left out: 2 of 5 images could not be used (" in capsys.readouterr().out
    nothing = open_source(shards("none", [0, 1, 2], broken=3))
    for look in (classifier.logits, frozen.features):
        with pytest.raises(NothingDecodes, match=r"no image of none/train could be decoded, for example .*: not an"):
            look(nothing)


def test_a_classifier_of_one_channel_sees_grey_images(tmp_path, shards):
    path = tmp_path / "grey.safetensors"
    save_encoder(
        path,
        ImageClassifier(tiny_swin(64, in_channels=1), 4),
        Preprocessing(image_size=(64, 64), mean=(0.5,), std=(0.2,)),
    )
    source = open_source(shards("set", [0, 1, 2]))
    classifier, frozen = load_classifier(path, device="cpu"), load_frozen(path, device="cpu")
    logits, features = classifier.logits(source).values, frozen.features(source).values
    embedded = np.array(Embedder(frozen, source)(np.arange(3))["feature"].to_pylist())
    torch.testing.assert_close(torch.tensor(embedded, dtype=torch.float32), features, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(classifier.model.head(features), logits, rtol=1e-4, atol=1e-7)


def test_the_digest_is_of_the_encoder_alone(saved):
    path, model = saved()
    assert load_frozen(path, device="cpu").digest == digest_of(model.encoder.state_dict())


def test_one_of_several_sets_of_weights(tmp_path):
    model = ImageClassifier(tiny_swin(64), 4)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": own, "ema": {name: value + 1 for name, value in own.items()}}, tmp_path / "both.pth")
    classifier = load_classifier(tmp_path / "both.pth", device="cpu", key="ema")
    assert torch.equal(classifier.model.head.weight, own["head.weight"] + 1)
    frozen = load_frozen(tmp_path / "both.pth", device="cpu", key="ema")
    assert torch.equal(frozen.encoder.norm.bias, own["encoder.norm.bias"] + 1)


def test_items_come_in_order_and_end():
    assert list(ahead(iter([3, 0, 2]))) == [3, 0, 2]


def test_options_out_of_range(saved):
    path, _ = saved()
    for load in (load_classifier, load_frozen):
        with pytest.raises(ValueError, match="--batch-size is 0"):
            load(path, batch_size=0)
        with pytest.raises(ValueError, match="--crop-pct is 0"):
            load(path, crop_pct=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no GPU"):
        choose_device("gpu")
