"""An exported model that gives other numbers than ours is refused."""

import pytest
from safetensors.torch import save_file
from torch import nn

from mixmae.convert.exported import compare, noise, read_export
from tests.factories import tiny_swin


def test_a_graph_with_other_numbers_is_refused(tmp_path):
    save_file(tiny_swin().state_dict(), tmp_path / "weights.safetensors")
    item = read_export(tmp_path / "weights.safetensors")
    assert "differs by 0e+00" in compare(item, "itself", item.model)
    with pytest.raises(ValueError, match="gives other numbers than the model"):
        compare(item, "another", lambda images: item.model(images) + 0.01)
    with pytest.raises(ValueError, match="gives other numbers"):
        compare(item, "broken", lambda images: item.model(images) * float("nan"))


def test_each_output_is_compared(tmp_path):
    """Numbers by their own largest value, indices by their share that differs."""

    class Both(nn.Module):
        def forward(self, images):
            return 1e-3 * images, images.argmax(dim=1)

    class Item:
        model, outputs, about = Both(), ("scores", "classes"), {}

        def images(self, batch):
            return noise(batch, 3, (64, 64))

    def changed(scores=0.0, pixels=0):
        def run(images):
            values, classes = Both()(images)
            classes.view(-1)[:pixels] += 1
            return [values + scores, classes]

        return run

    assert "differs by 0e+00" in compare(Item(), "same", changed())
    compare(Item(), "a tie", changed(pixels=4))
    with pytest.raises(ValueError, match="other indices than the model"):
        compare(Item(), "wrong", changed(pixels=64))
    with pytest.raises(ValueError, match="other numbers than the model"):
        compare(Item(), "wrong", changed(scores=1e-5))
    with pytest.raises(ValueError, match="shorter"):
        compare(Item(), "one output", lambda images: [images * 1e-3])
