"""An exported model that gives other numbers than ours is refused."""

import pytest
from safetensors.torch import save_file

from mixmae.convert.exported import compare, read_export
from tests.factories import tiny_swin


def test_a_graph_with_other_numbers_is_refused(tmp_path):
    save_file(tiny_swin().state_dict(), tmp_path / "weights.safetensors")
    item = read_export(tmp_path / "weights.safetensors")
    assert "differs by 0e+00" in compare(item, "itself", item.model)
    with pytest.raises(ValueError, match="gives other numbers than the model"):
        compare(item, "another", lambda images: item.model(images) + 0.01)
    with pytest.raises(ValueError, match="gives other numbers"):
        compare(item, "broken", lambda images: item.model(images) * float("nan"))
