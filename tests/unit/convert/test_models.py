"""Models from weights."""

import pytest
import torch
from safetensors.torch import save_file

from mixmae.convert import (
    load_encoder,
)
from tests.factories import tiny_mixmae


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("encoder.norm.bias"),
        lambda state: state.update({"encoder.fc_norm.weight": torch.ones(3)}),
        lambda state: state.update({"encoder.norm.bias": torch.ones(3)}),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fill_their_architecture(tmp_path, change):
    state = tiny_mixmae().state_dict()
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=r"does not fill the SwinEncoder.*norm\.(bias|weight).*\(1 such\)"):
        load_encoder(tmp_path / "changed.safetensors")
