"""PVT as its authors publish it."""

import pytest
import torch

from mixmae.convert import (
    detect_format,
    to_ours,
)
from tests.factories import tiny_pvt, tiny_pvt_v2


def published_pvt(encoder):
    """The names of PVT's authors, from ours: numbered parts, flat tables, a class token in stage 4 of v1."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name.startswith("stages."):
            _, stage, kind, *rest = name.split(".")
            renamed = {"blocks": "block"}.get(kind, kind)
            name = ".".join([f"{renamed}{int(stage) + 1}", *rest]).replace(".dwconv.", ".dwconv.dwconv.")
        state[name] = value.flatten(1, 2) if name.startswith("pos_embed") else value
    if "pos_embed4" in state:
        state["pos_embed4"] = torch.cat([torch.ones(1, 1, 32), state["pos_embed4"]], dim=1)
        state["cls_token"] = torch.ones(1, 1, 32)
    return state | {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}


@pytest.mark.parametrize("build", [tiny_pvt, tiny_pvt_v2])
def test_pvt_of_its_authors(build):
    encoder = build()
    state = published_pvt(encoder)
    assert detect_format(state) == "pvt"
    assert f"block3.1.{'mlp.dwconv.dwconv' if build is tiny_pvt_v2 else 'attn.kv'}.weight" in state
    ours = to_ours(state)
    classes = {name: ours.pop(name) for name in list(ours) if name.startswith("head.")}
    assert bool(classes) == (build is tiny_pvt_v2)  # that of v1 reads the class token
    expected = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
